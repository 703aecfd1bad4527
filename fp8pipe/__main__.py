"""`python -m fp8pipe` is the command line."""

from fp8pipe.cli import main

main()
