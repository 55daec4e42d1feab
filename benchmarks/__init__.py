"""What things cost, each measured beside the common way to do it. Each script runs by itself."""
