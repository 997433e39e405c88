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
    "malladi2023kernel": """
        @inproceedings{malladi2023kernel,
          title         = {A Kernel-Based View of Language Model Fine-Tuning},
          author        = {Malladi, Sadhika and Wettig, Alexander and Yu, Dingli and Chen,
                           Danqi and Arora, Sanjeev},
          booktitle     = {Proceedings of the 40th International Conference on Machine
                           Learning},
          year          = {2023},
          eprint        = {2210.05643},
          archiveprefix = {arXiv}
        }""",
    "novak2022fast": """
        @inproceedings{novak2022fast,
          title         = {Fast Finite Width Neural Tangent Kernel},
          author        = {Novak, Roman and Sohl-Dickstein, Jascha and Schoenholz, Samuel S.},
          booktitle     = {Proceedings of the 39th International Conference on Machine
                           Learning},
          year          = {2022},
          eprint        = {2206.08720},
          archiveprefix = {arXiv}
        }""",
    "xia2024less": """
        @inproceedings{xia2024less,
          title         = {{LESS}: Selecting Influential Data for Targeted Instruction
                           Tuning},
          author        = {Xia, Mengzhou and Malladi, Sadhika and Gururangan, Suchin and
                           Arora, Sanjeev and Chen, Danqi},
          booktitle     = {Proceedings of the 41st International Conference on Machine
                           Learning},
          year          = {2024},
          eprint        = {2402.04333},
          archiveprefix = {arXiv}
        }""",
    "park2023trak": """
        @inproceedings{park2023trak,
          title         = {{TRAK}: Attributing Model Behavior at Scale},
          author        = {Park, Sung Min and Georgiev, Kristian and Ilyas, Andrew and
                           Leclerc, Guillaume and Madry, Aleksander},
          booktitle     = {Proceedings of the 40th International Conference on Machine
                           Learning},
          year          = {2023},
          eprint        = {2303.14186},
          archiveprefix = {arXiv}
        }""",
    "pruthi2020tracin": """
        @inproceedings{pruthi2020tracin,
          title         = {Estimating Training Data Influence by Tracing Gradient Descent},
          author        = {Pruthi, Garima and Liu, Frederick and Kale, Satyen and
                           Sundararajan, Mukund},
          booktitle     = {Advances in Neural Information Processing Systems},
          volume        = {33},
          year          = {2020},
          eprint        = {2002.08484},
          archiveprefix = {arXiv}
        }""",
    "paul2021diet": """
        @inproceedings{paul2021diet,
          title         = {Deep Learning on a Data Diet: Finding Important Examples Early in
                           Training},
          author        = {Paul, Mansheej and Ganguli, Surya and Dziugaite, Gintare Karolina},
          booktitle     = {Advances in Neural Information Processing Systems},
          volume        = {34},
          year          = {2021},
          eprint        = {2107.07075},
          archiveprefix = {arXiv}
        }""",
    "ilyas2022datamodels": """
        @inproceedings{ilyas2022datamodels,
          title         = {Datamodels: Predicting Predictions from Training Data},
          author        = {Ilyas, Andrew and Park, Sung Min and Engstrom, Logan and Leclerc,
                           Guillaume and Madry, Aleksander},
          booktitle     = {Proceedings of the 39th International Conference on Machine
                           Learning},
          year          = {2022},
          eprint        = {2202.00622},
          archiveprefix = {arXiv}
        }""",
    "chen2025lozo": """
        @inproceedings{chen2025lozo,
          title         = {Enhancing Zeroth-Order Fine-Tuning for Language Models with Low-
                           Rank Structures},
          author        = {Chen, Yiming and Zhang, Yuan and Cao, Liyuan and Yuan, Kun and
                           Wen, Zaiwen},
          booktitle     = {International Conference on Learning Representations},
          year          = {2025},
          eprint        = {2410.07698},
          archiveprefix = {arXiv}
        }""",
    "li2021svag": """
        @inproceedings{li2021svag,
          title         = {On the Validity of Modeling {SGD} with Stochastic Differential
                           Equations ({SDEs})},
          author        = {Li, Zhiyuan and Malladi, Sadhika and Arora, Sanjeev},
          booktitle     = {Advances in Neural Information Processing Systems},
          year          = {2021},
          eprint        = {2102.12470},
          archiveprefix = {arXiv}
        }""",
    "malladi2022sdes": """
        @inproceedings{malladi2022sdes,
          title         = {On the {SDEs} and Scaling Rules for Adaptive Gradient Algorithms},
          author        = {Malladi, Sadhika and Lyu, Kaifeng and Panigrahi, Abhishek and
                           Arora, Sanjeev},
          booktitle     = {Advances in Neural Information Processing Systems},
          year          = {2022},
          eprint        = {2205.10287},
          archiveprefix = {arXiv}
        }""",
    "wang2024momentum": """
        @inproceedings{wang2024momentum,
          title         = {The Marginal Value of Momentum for Small Learning Rate {SGD}},
          author        = {Wang, Runzhe and Malladi, Sadhika and Wang, Tianhao and Lyu,
                           Kaifeng and Li, Zhiyuan},
          booktitle     = {International Conference on Learning Representations},
          year          = {2024},
          eprint        = {2307.15196},
          archiveprefix = {arXiv}
        }""",
    "gu2024qsr": """
        @inproceedings{gu2024qsr,
          title         = {A Quadratic Synchronization Rule for Distributed Deep Learning},
          author        = {Gu, Xinran and Lyu, Kaifeng and Arora, Sanjeev and Zhang,
                           Jingzhao and Huang, Longbo},
          booktitle     = {International Conference on Learning Representations},
          year          = {2024},
          eprint        = {2310.14423},
          archiveprefix = {arXiv}
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
    "lozo": ("chen2025lozo",),
    "ntk": ("malladi2023kernel", "novak2022fast"),
    "gradient_features": ("xia2024less",),
    "score": ("xia2024less",),
    "selection_study": ("xia2024less",),
    "less": ("xia2024less",),
    "trak": ("park2023trak",),
    "tracin": ("pruthi2020tracin",),
    "grand": ("paul2021diet",),
    "el2n": ("paul2021diet",),
    "svag": ("li2021svag", "malladi2022sdes"),
    "sgd_sde": ("li2021svag",),
    "rmsprop_sde": ("malladi2022sdes",),
    "adam_sde": ("malladi2022sdes",),
    "scale_rule": ("malladi2022sdes", "li2021svag"),
    "sgdm": ("wang2024momentum",),
    "qsr": ("gu2024qsr",),
    "local_update": ("gu2024qsr",),
    "lds": ("ilyas2022datamodels", "park2023trak"),
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
