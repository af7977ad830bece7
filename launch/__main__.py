"""`python -m launch`: the `sapo` command from a checkout that is not installed."""

from launch.cli import main

main()
