"""`python -m common.evaluation`: see common/evaluation/accuracy.py."""

import tyro

from common.evaluation.accuracy import Args, main

if __name__ == "__main__":
    main(tyro.cli(Args))
