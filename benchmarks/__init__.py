"""What cuflash costs and what it gains, measured beside the other libraries: see README.md."""
