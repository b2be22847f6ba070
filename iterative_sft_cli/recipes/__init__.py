"""Published methods as configs that can be written to a folder: `names`, `title_of`, `files_of` and `write_recipe`. Imports no torch."""

from iterative_sft_cli.recipes.catalog import files_of, names, title_of, write_recipe

__all__ = ["files_of", "names", "title_of", "write_recipe"]
