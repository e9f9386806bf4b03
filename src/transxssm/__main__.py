"""`python -m transxssm`, as `torchrun -m` and `accelerate launch -m` need it; the installed command is `transxssm`."""

from transxssm_cli.__main__ import main

if __name__ == "__main__":
    main()
