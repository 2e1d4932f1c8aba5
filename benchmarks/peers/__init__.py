"""Other runtimes, measured on the same token ids, windows and machine."""
