"""vgpo.py with the focus of the state that predicts a token, one place before the token's own, which the paper takes.

    python tests/benchmarks/earlier_focus.py --steps 100     # any flag of vgpo.py

To see what the choice of the state does: at the built-in model a token's own state is less visual where the token reads
the picture, and the state that predicts it is more so (`credit`). A script like the five, so that
`common.evaluation.study` takes it by name.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import vgpo
from common.run.settings import parse


def earlier(states: torch.Tensor, prompt_states: torch.Tensor) -> torch.Tensor:
    """The states [R, T, H] that predict the tokens of completions, from the tokens' own and the prompts' [N, P, H],
    which are padded on the left.

    >>> own, prompts = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]), torch.tensor([[[8.0], [9.0]]])
    >>> earlier(own, prompts)[:, :, 0]
    tensor([[9., 1.],
            [9., 3.]])
    """
    last = prompt_states[:, -1:].repeat_interleave(len(states) // len(prompt_states), dim=0)  # [R, 1, H]
    return torch.cat([last, states[:, :-1]], dim=1)


def main() -> None:
    own = vgpo.advantage_factors

    def advantage_factors(states, prompt_states, *rest):
        return own(earlier(states, prompt_states), prompt_states, *rest)

    vgpo.advantage_factors = advantage_factors
    vgpo.main(parse(vgpo.Args))


if __name__ == "__main__":
    main()
