"""The commands, a file for each group; importing this package registers them on the app in the order of `--help`."""

from iterative_sft_cli.commands import run_commands  # noqa: F401  isort: skip
from iterative_sft_cli.commands import config_commands  # noqa: F401  isort: skip
from iterative_sft_cli.commands import read_commands  # noqa: F401  isort: skip
from iterative_sft_cli.commands import hand_over_commands  # noqa: F401  isort: skip
from iterative_sft_cli.commands import filter_commands  # noqa: F401  isort: skip
from iterative_sft_cli.commands import model_commands  # noqa: F401  isort: skip
from iterative_sft_cli.commands import recipe_commands  # noqa: F401  isort: skip
from iterative_sft_cli.commands import docs_command  # noqa: F401  isort: skip
