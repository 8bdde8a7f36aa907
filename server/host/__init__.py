"""What this host and its container allow: memory, CPUs, files kept between runs."""
