"""The `concord` command: the outermost layer, which starts every other room."""
