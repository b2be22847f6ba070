"""Files that recipes put beside their configs: plug-ins to change."""
