"""Pure decisions, one file each."""
