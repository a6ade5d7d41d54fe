"""The passes: discover, calibrate, transform, solve, lower; one method a file."""
