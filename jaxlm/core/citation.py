"""The papers behind a function, as BibTeX."""

import difflib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxlm.core.errors import UserError

_NEURIPS = "Advances in Neural Information Processing Systems"
_ICLR = "International Conference on Learning Representations"
_ICML = "International Conference on Machine Learning"
_ACL = "Annual Meeting of the Association for Computational Linguistics"


class _Paper(NamedTuple):
    """What an entry is made of; its number is one of arXiv, or a DOI."""

    author: str
    title: str
    venue: str
    year: int
    number: str

    def entry(self, key: str) -> str:
        """BibTeX."""
        arxiv = re.fullmatch(r"\d{4}\.\d{5}", self.number)
        article = not self.venue or self.venue.startswith(("IEEE", "Foundations"))
        kind, place = ("article", "journal") if article else ("inproceedings", "booktitle")
        fields = {
            "title": self.title,
            "author": self.author,
            place: self.venue or f"arXiv:{self.number}",
            "year": str(self.year),
            **(
                {"eprint": self.number, "archiveprefix": "arXiv"} if arxiv else {"doi": self.number}
            ),
        }
        lines = [f"  {name:<13} = {{{value}}}" for name, value in fields.items()]
        return f"@{kind}{{{key},\n" + ",\n".join(lines) + "\n}"


_PAPERS = {
    "malladi2023mezo": _Paper(
        "Malladi, Sadhika and Gao, Tianyu and Nichani, Eshaan and Damian, Alex and Lee, Jason "
        "D. and Chen, Danqi and Arora, Sanjeev",
        "Fine-Tuning Language Models with Just Forward Passes",
        _NEURIPS,
        2023,
        "2305.17333",
    ),
    "spall1992spsa": _Paper(
        "Spall, James C.",
        "Multivariate Stochastic Approximation Using a Simultaneous Perturbation Gradient "
        "Approximation",
        "IEEE Transactions on Automatic Control",
        1992,
        "10.1109/9.119632",
    ),
    "chen2025lozo": _Paper(
        "Chen, Yiming and Zhang, Yuan and Cao, Liyuan and Yuan, Kun and Wen, Zaiwen",
        "Enhancing Zeroth-Order Fine-Tuning for Language Models with Low-Rank Structures",
        _ICLR,
        2025,
        "2410.07698",
    ),
    "dang2026fzoo": _Paper(
        "Dang, Sizhe and Guo, Yangyang and Zhao, Yanjun and Ye, Haishan and Zheng, Xiaodong "
        "and Dai, Guang and Tsang, Ivor",
        "{FZOO}: Fast Zeroth-Order Optimizer for Fine-Tuning Large Language Models towards "
        "Adam-Scale Speed",
        _ICLR,
        2026,
        "2506.09034",
    ),
    "dbouk2026meazo": _Paper(
        "Dbouk, Hassan and Gazagnadou, Nidham and Reisser, Matthias and Louizos, Christos",
        "On Adaptivity in Zeroth-Order Optimization",
        "",
        2026,
        "2605.03869",
    ),
    "cai2026adamezo": _Paper(
        "Cai, Zhijie and Chen, Haolong and Zhu, Guangxu",
        "{AdaMeZO}: Adam-style Zeroth-Order Optimizer for {LLM} Fine-tuning Without "
        "Maintaining the Moments",
        "",
        2026,
        "2605.00650",
    ),
    "lang2026zomuon": _Paper(
        "Lang, Yicheng and Wang, Changsheng and Zhang, Yihua and Hong, Mingyi and Zhang, "
        "Zheng and Yin, Wotao and Liu, Sijia",
        "Powering Up Zeroth-Order Training via Subspace Gradient Orthogonalization",
        "",
        2026,
        "2602.17155",
    ),
    "liu2024sparsemezo": _Paper(
        "Liu, Yong and Zhu, Zirui and Gong, Chaoyu and Cheng, Minhao and Hsieh, Cho-Jui and "
        "You, Yang",
        "Sparse {MeZO}: Less Parameters for Better Performance in Zeroth-Order {LLM} Fine- Tuning",
        "",
        2024,
        "2402.15751",
    ),
    "park2025bcd": _Paper(
        "Park, Sihwan and Yun, Jihun and Kim, SungYub and Kundu, Souvik and Yang, Eunho",
        "Elucidating Subspace Perturbation in Zeroth-Order Optimization: Theory and Practice "
        "at Scale",
        "",
        2025,
        "2501.19099",
    ),
    "qiu2025es": _Paper(
        "Qiu, Xin and Gan, Yulu and Hayes, Conor F. and Liang, Qiyao and Meyerson, Elliot and "
        "Hodjat, Babak and Miikkulainen, Risto",
        "Evolution Strategies at Scale: {LLM} Fine-Tuning Beyond Reinforcement Learning",
        "",
        2025,
        "2509.24372",
    ),
    "baydin2022forward": _Paper(
        "Baydin, Atilim Gunes and Pearlmutter, Barak A. and Syme, Don and Wood, Frank and "
        "Torr, Philip",
        "Gradients without Backpropagation",
        "",
        2022,
        "2202.08587",
    ),
    "malladi2023kernel": _Paper(
        "Malladi, Sadhika and Wettig, Alexander and Yu, Dingli and Chen, Danqi and Arora, Sanjeev",
        "A Kernel-Based View of Language Model Fine-Tuning",
        _ICML,
        2023,
        "2210.05643",
    ),
    "jacot2018ntk": _Paper(
        "Jacot, Arthur and Gabriel, Franck and Hongler, Clement",
        "Neural Tangent Kernel: Convergence and Generalization in Neural Networks",
        _NEURIPS,
        2018,
        "1806.07572",
    ),
    "novak2022fast": _Paper(
        "Novak, Roman and Sohl-Dickstein, Jascha and Schoenholz, Samuel S.",
        "Fast Finite Width Neural Tangent Kernel",
        _ICML,
        2022,
        "2206.08720",
    ),
    "lee2019wide": _Paper(
        "Lee, Jaehoon and Xiao, Lechao and Schoenholz, Samuel S. and Bahri, Yasaman and "
        "Novak, Roman and Sohl-Dickstein, Jascha and Pennington, Jeffrey",
        "Wide Neural Networks of Any Depth Evolve as Linear Models Under Gradient Descent",
        _NEURIPS,
        2019,
        "1902.06720",
    ),
    "he2022asymmetric": _Paper(
        "He, Mingzhen and He, Fan and Shi, Lei and Huang, Xiaolin and Suykens, Johan A. K.",
        "Learning with Asymmetric Kernels: Least Squares and Feature Interpretation",
        "",
        2022,
        "2202.01397",
    ),
    "aghajanyan2020intrinsic": _Paper(
        "Aghajanyan, Armen and Zettlemoyer, Luke and Gupta, Sonal",
        "Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning",
        "",
        2020,
        "2012.13255",
    ),
    "hu2022lora": _Paper(
        "Hu, Edward J. and Shen, Yelong and Wallis, Phillip and Allen-Zhu, Zeyuan and Li, "
        "Yuanzhi and Wang, Shean and Wang, Lu and Chen, Weizhu",
        "{LoRA}: Low-Rank Adaptation of Large Language Models",
        _ICLR,
        2022,
        "2106.09685",
    ),
    "li2021prefix": _Paper(
        "Li, Xiang Lisa and Liang, Percy",
        "Prefix-Tuning: Optimizing Continuous Prompts for Generation",
        _ACL,
        2021,
        "2101.00190",
    ),
    "benzaken2022bitfit": _Paper(
        "Ben Zaken, Elad and Goldberg, Yoav and Ravfogel, Shauli",
        "{BitFit}: Simple Parameter-efficient Fine-tuning for Transformer-based Masked "
        "Language-models",
        _ACL,
        2022,
        "2106.10199",
    ),
    "xia2024less": _Paper(
        "Xia, Mengzhou and Malladi, Sadhika and Gururangan, Suchin and Arora, Sanjeev and "
        "Chen, Danqi",
        "{LESS}: Selecting Influential Data for Targeted Instruction Tuning",
        _ICML,
        2024,
        "2402.04333",
    ),
    "park2023trak": _Paper(
        "Park, Sung Min and Georgiev, Kristian and Ilyas, Andrew and Leclerc, Guillaume and "
        "Madry, Aleksander",
        "{TRAK}: Attributing Model Behavior at Scale",
        _ICML,
        2023,
        "2303.14186",
    ),
    "pruthi2020tracin": _Paper(
        "Pruthi, Garima and Liu, Frederick and Kale, Satyen and Sundararajan, Mukund",
        "Estimating Training Data Influence by Tracing Gradient Descent",
        _NEURIPS,
        2020,
        "2002.08484",
    ),
    "paul2021diet": _Paper(
        "Paul, Mansheej and Ganguli, Surya and Dziugaite, Gintare Karolina",
        "Deep Learning on a Data Diet: Finding Important Examples Early in Training",
        _NEURIPS,
        2021,
        "2107.07075",
    ),
    "ilyas2022datamodels": _Paper(
        "Ilyas, Andrew and Park, Sung Min and Engstrom, Logan and Leclerc, Guillaume and "
        "Madry, Aleksander",
        "Datamodels: Predicting Predictions from Training Data",
        _ICML,
        2022,
        "2202.00622",
    ),
    "ivison2025selection": _Paper(
        "Ivison, Hamish and Zhang, Muru and Brahman, Faeze and Koh, Pang Wei and Dasigi, Pradeep",
        "Large-Scale Data Selection for Instruction Tuning",
        "",
        2025,
        "2503.01807",
    ),
    "robertson2009bm25": _Paper(
        "Robertson, Stephen and Zaragoza, Hugo",
        "The Probabilistic Relevance Framework: {BM25} and Beyond",
        "Foundations and Trends in Information Retrieval",
        2009,
        "10.1561/1500000019",
    ),
    "li2021svag": _Paper(
        "Li, Zhiyuan and Malladi, Sadhika and Arora, Sanjeev",
        "On the Validity of Modeling {SGD} with Stochastic Differential Equations ({SDEs})",
        _NEURIPS,
        2021,
        "2102.12470",
    ),
    "malladi2022sdes": _Paper(
        "Malladi, Sadhika and Lyu, Kaifeng and Panigrahi, Abhishek and Arora, Sanjeev",
        "On the {SDEs} and Scaling Rules for Adaptive Gradient Algorithms",
        _NEURIPS,
        2022,
        "2205.10287",
    ),
    "li2017sme": _Paper(
        "Li, Qianxiao and Tai, Cheng and E, Weinan",
        "Stochastic Modified Equations and Adaptive Stochastic Gradient Algorithms",
        _ICML,
        2017,
        "1511.06251",
    ),
    "wu2020noisy": _Paper(
        "Wu, Jingfeng and Hu, Wenqing and Xiong, Haoyi and Huan, Jun and Braverman, Vladimir "
        "and Zhu, Zhanxing",
        "On the Noisy Gradient Descent that Generalizes as {SGD}",
        _ICML,
        2020,
        "1906.07405",
    ),
    "wang2024momentum": _Paper(
        "Wang, Runzhe and Malladi, Sadhika and Wang, Tianhao and Lyu, Kaifeng and Li, Zhiyuan",
        "The Marginal Value of Momentum for Small Learning Rate {SGD}",
        _ICLR,
        2024,
        "2307.15196",
    ),
    "gu2023local": _Paper(
        "Gu, Xinran and Lyu, Kaifeng and Huang, Longbo and Arora, Sanjeev",
        "Why (and When) does Local {SGD} Generalize Better than {SGD}?",
        _ICLR,
        2023,
        "2303.01215",
    ),
    "gu2024qsr": _Paper(
        "Gu, Xinran and Lyu, Kaifeng and Arora, Sanjeev and Zhang, Jingzhao and Huang, Longbo",
        "A Quadratic Synchronization Rule for Distributed Deep Learning",
        _ICLR,
        2024,
        "2310.14423",
    ),
    "hoffmann2022chinchilla": _Paper(
        "Hoffmann, Jordan and Borgeaud, Sebastian and Mensch, Arthur and others",
        "Training Compute-Optimal Large Language Models",
        _NEURIPS,
        2022,
        "2203.15556",
    ),
    "jin2025journey": _Paper(
        "Jin, Tian and Humayun, Ahmed Imtiaz and Evci, Utku and Subramanian, Suvinay and "
        "Yazdanbakhsh, Amir and Alistarh, Dan and Dziugaite, Gintare Karolina",
        "The Journey Matters: Average Parameter Count over Pre-training Unifies Sparse and "
        "Dense Scaling Laws",
        _ICLR,
        2025,
        "2501.12486",
    ),
    "li2025steplaw": _Paper(
        "Li, Houyi and others",
        "Predictable Scale: Part {I}, Step Law -- Optimal Hyperparameter Scaling Law in Large "
        "Language Model Pretraining",
        "",
        2025,
        "2503.04715",
    ),
    "xiao2024crossover": _Paper(
        "Xiao, Lechao",
        "Rethinking Conventional Wisdom in Machine Learning: From Generalization to Scaling",
        "",
        2024,
        "2409.15156",
    ),
    "pang2004subjectivity": _Paper(
        "Pang, Bo and Lee, Lillian",
        "A Sentimental Education: Sentiment Analysis Using Subjectivity Summarization Based "
        "on Minimum Cuts",
        _ACL,
        2004,
        "10.3115/1218955.1218990",
    ),
    "pang2005stars": _Paper(
        "Pang, Bo and Lee, Lillian",
        "Seeing Stars: Exploiting Class Relationships for Sentiment Categorization with "
        "Respect to Rating Scales",
        _ACL,
        2005,
        "10.3115/1219840.1219855",
    ),
}

_CITED_BY = {
    "malladi2023mezo": "mezo mezo_momentum mezo_adam replayed_momentum replayed_adam zeroth_order "
    "jit_step replay residual_feedback variance_modified expectation_modified "
    "tree_norms probed_norms",
    "cai2026adamezo": "mezo_adam replayed_adam",
    "spall1992spsa": "mezo spsa central one_sided scale_by_spsa value_and_grad materialize",
    "chen2025lozo": "lozo lozo_momentum lozo_residual low_rank factored_momentum",
    "dang2026fzoo": "fzoo normalized_by_spread",
    "dbouk2026meazo": "meazo normalized_by_average",
    "lang2026zomuon": "zo_muon subspace orthogonalized",
    "liu2024sparsemezo": "magnitude",
    "park2025bcd": "layer_blocks",
    "qiu2025es": "population",
    "baydin2022forward": "forward_gradient",
    "lee2019wide": "linearize",
    "he2022asymmetric": "asymmetric_svm AsymmetricSvm",
    "malladi2023kernel": "ntk kernel_behaviour_report asymmetric_svm AsymmetricSvm ridge_path "
    "kernel_change fixed_features linearization_score projected",
    "jacot2018ntk": "ntk",
    "novak2022fast": "ntk jacobian_contraction ntk_vector_products factorized",
    "aghajanyan2020intrinsic": "intrinsic_dimension",
    "hu2022lora": "lora Lora",
    "li2021prefix": "prefix Prefix",
    "benzaken2022bitfit": "bitfit bitfit_selection BitFit",
    "xia2024less": "gradient_features score select selection_study less representation_similarity",
    "ivison2025selection": "representation_similarity",
    "pruthi2020tracin": "tracin grad_dot",
    "paul2021diet": "grand el2n",
    "ilyas2022datamodels": "lds",
    "park2023trak": "trak lds gradient_features projected",
    "robertson2009bm25": "bm25",
    "li2017sme": "sgd_sde sgdm_sde",
    "wu2020noisy": "example_noise",
    "gu2024qsr": "qsr local_update local_sgd_sde",
    "gu2023local": "local_sgd_sde local_drift_factor",
    "malladi2022sdes": "scale_rule rmsprop_sde adam_sde ngos",
    "li2021svag": "svag svag_coefficients sgd_sde scale_rule grad_noise_stats "
    "gaussian_example_weights example_noise",
    "wang2024momentum": "sgdm sgdm_sde effective_lr_schedule compare_momentum coupled_iterate",
    "hoffmann2022chinchilla": "fit_power_law fit_chinchilla",
    "jin2025journey": "average_params fit_chinchilla",
    "li2025steplaw": "step_law",
    "xiao2024crossover": "crossover",
    "pang2005stars": "mr",
    "pang2004subjectivity": "subj",
}
"""Names behind which a paper is; of one name the papers stand in this order, the closest first."""

# Behind svag are three papers, of which that on adaptive optimizers is second.
_NAMES: dict[str, list[str]] = {}
for _key, _names in _CITED_BY.items():
    for _name in _names.split():
        _NAMES.setdefault(_name, []).append(_key)
_NAMES["svag"] += ["malladi2022sdes", "wang2024momentum"]


def cite(name: str | Callable[..., Any]) -> str:
    """BibTeX of the papers behind a function, a method of `optimizer.name`, or a shipped task.

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
    if short not in _NAMES:
        near = difflib.get_close_matches(short, _NAMES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(_NAMES)}."
        raise UserError(f"No paper is recorded for {full!r}: {hint}")
    return "\n\n".join(_PAPERS[key].entry(key) for key in _NAMES[short])
