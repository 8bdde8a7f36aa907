"""Resources of this host and container: memory, CPU cores and threads, the user's cache folder."""
