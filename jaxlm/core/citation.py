"""The papers behind a function, as BibTeX."""

import difflib
import textwrap
from collections.abc import Callable
from typing import Any

from jaxlm.core.errors import UserError

_PAPERS = {
    "malladi2023mezo": """
        @inproceedings{malladi2023mezo,
          title     = {Fine-Tuning Language Models with Just Forward Passes},
          author    = {Malladi, Sadhika and Gao, Tianyu and Nichani, Eshaan and Damian, Alex and
                       Lee, Jason D. and Chen, Danqi and Arora, Sanjeev},
          booktitle = {Advances in Neural Information Processing Systems},
          volume    = {36},
          year      = {2023},
          eprint    = {2305.17333},
          archiveprefix = {arXiv}
        }""",
    "spall1992spsa": """
        @article{spall1992spsa,
          title   = {Multivariate Stochastic Approximation Using a Simultaneous Perturbation
                     Gradient Approximation},
          author  = {Spall, James C.},
          journal = {IEEE Transactions on Automatic Control},
          volume  = {37},
          number  = {3},
          pages   = {332--341},
          year    = {1992},
          doi     = {10.1109/9.119632}
        }""",
    "pang2004subjectivity": """
        @inproceedings{pang2004subjectivity,
          title     = {A Sentimental Education: Sentiment Analysis Using Subjectivity Summarization
                       Based on Minimum Cuts},
          author    = {Pang, Bo and Lee, Lillian},
          booktitle = {Proceedings of the 42nd Annual Meeting of the Association for Computational
                       Linguistics},
          pages     = {271--278},
          year      = {2004},
          doi       = {10.3115/1218955.1218990}
        }""",
    "pang2005stars": """
        @inproceedings{pang2005stars,
          title     = {Seeing Stars: Exploiting Class Relationships for Sentiment Categorization
                       with Respect to Rating Scales},
          author    = {Pang, Bo and Lee, Lillian},
          booktitle = {Proceedings of the 43rd Annual Meeting of the Association for Computational
                       Linguistics},
          pages     = {115--124},
          year      = {2005},
          doi       = {10.3115/1219840.1219855}
        }""",
}

_CITED_BY = {
    "mezo": ("malladi2023mezo", "spall1992spsa"),
    "mr": ("pang2005stars",),
    "spsa": ("spall1992spsa",),
    "subj": ("pang2004subjectivity",),
}


def cite(name: str | Callable[..., Any]) -> str:
    """BibTeX of the papers behind a function or a shipped task.

    Args:
      name: a name such as `"mezo"`, `"zo.mezo"` or `"subj"`, or the function itself.

    Returns:
      One BibTeX entry for each paper, the closest first, with a blank line between two.

    Raises:
      UserError: nothing is recorded under that name.

    >>> print(cite("mezo").splitlines()[0])
    @inproceedings{malladi2023mezo,
    """
    full = name if isinstance(name, str) else getattr(name, "__name__", str(name))
    short = full.rpartition(".")[2]
    if short not in _CITED_BY:
        near = difflib.get_close_matches(short, _CITED_BY, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(_CITED_BY)}."
        raise UserError(f"No paper is recorded for {full!r}: {hint}")
    return "\n\n".join(textwrap.dedent(_PAPERS[key]).strip() for key in _CITED_BY[short])
