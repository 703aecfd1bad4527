"""Makes `python -m fp8pipe` run the command line."""

from fp8pipe.cli import main

main()
