"""The papers that cards refer to, as BibTeX."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

SECOKD, LORA, GKD = "2406.14208", "2106.09685", "2306.13649"


class Paper(NamedTuple):
    """One paper on arXiv: the key of its entry, its first author or all of them, its title and its year."""

    key: str
    authors: str
    title: str
    year: int


PAPERS: dict[str, Paper] = {
    "1312.6184": Paper("ba2014deep", "Ba, Lei Jimmy and Caruana, Rich", "Do Deep Nets Really Need to be Deep?", 2013),
    "1412.6550": Paper("romero2014fitnets", "Romero, Adriana and others", "FitNets: Hints for Thin Deep Nets", 2014),
    "1503.02531": Paper(
        "hinton2015distilling",
        "Hinton, Geoffrey and Vinyals, Oriol and Dean, Jeff",
        "Distilling the Knowledge in a Neural Network",
        2015,
    ),
    "1606.07947": Paper(
        "kim2016sequence", "Kim, Yoon and Rush, Alexander M.", "Sequence-Level Knowledge Distillation", 2016
    ),
    "1703.01780": Paper(
        "tarvainen2017mean",
        "Tarvainen, Antti and Valpola, Harri",
        "Mean teachers are better role models: Weight-averaged consistency targets improve semi-supervised deep "
        "learning results",
        2017,
    ),
    "1908.01851": Paper(
        "hahn2019self",
        "Hahn, Sangchul and Choi, Heeyoul",
        "Self-Knowledge Distillation in Natural Language Processing",
        2019,
    ),
    "1909.10351": Paper(
        "jiao2019tinybert",
        "Jiao, Xiaoqi and others",
        "TinyBERT: Distilling BERT for Natural Language Understanding",
        2019,
    ),
    "1910.01108": Paper(
        "sanh2019distilbert",
        "Sanh, Victor and Debut, Lysandre and Chaumond, Julien and Wolf, Thomas",
        "DistilBERT, a distilled version of BERT: smaller, faster, cheaper and lighter",
        2019,
    ),
    "2002.08484": Paper(
        "pruthi2020estimating",
        "Pruthi, Garima and others",
        "Estimating Training Data Influence by Tracing Gradient Descent",
        2020,
    ),
    "2002.10957": Paper(
        "wang2020minilm",
        "Wang, Wenhui and others",
        "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained Transformers",
        2020,
    ),
    "2006.12000": Paper(
        "kim2020self",
        "Kim, Kyungyul and others",
        "Self-Knowledge Distillation with Progressive Refinement of Targets",
        2020,
    ),
    "2106.09685": Paper(
        "hu2021lora", "Hu, Edward J. and others", "LoRA: Low-Rank Adaptation of Large Language Models", 2021
    ),
    "2212.08349": Paper(
        "li2022swing",
        "Li, Junzhuo and others",
        "Swing Distillation: A Privacy-Preserving Knowledge Distillation Framework",
        2022,
    ),
    "2305.14890": Paper(
        "nix2023hard",
        "Nix, Arne and Burg, Max F. and Sinz, Fabian H.",
        "HARD: Hard Augmentations for Robust Distillation",
        2023,
    ),
    "2306.08543": Paper(
        "gu2023minillm",
        "Gu, Yuxian and Dong, Li and Wei, Furu and Huang, Minlie",
        "MiniLLM: Knowledge Distillation of Large Language Models",
        2023,
    ),
    "2306.13649": Paper(
        "agarwal2023onpolicy",
        "Agarwal, Rishabh and others",
        "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
        2023,
    ),
    "2307.15190": Paper(
        "wen2023fdivergence",
        "Wen, Yuqiao and others",
        "f-Divergence Minimization for Sequence-Level Knowledge Distillation",
        2023,
    ),
    "2308.01825": Paper(
        "yuan2023scaling",
        "Yuan, Zheng and others",
        "Scaling Relationship on Learning Mathematical Reasoning with Large Language Models",
        2023,
    ),
    "2309.17134": Paper(
        "carrino2023promoting",
        "Carrino, Casimiro Pio and Escolano, Carlos and Fonollosa, Jose A. R.",
        "Promoting Generalized Cross-lingual Question Answering in Few-resource Scenarios via Self-knowledge "
        "Distillation",
        2023,
    ),
    "2311.08213": Paper(
        "li2023unlock",
        "Li, Xinwei and others",
        "Unlock the Power: Competitive Distillation for Multi-Modal Large Language Models",
        2023,
    ),
    "2402.03300": Paper(
        "shao2024deepseekmath",
        "Shao, Zhihong and others",
        "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
        2024,
    ),
    "2402.03898": Paper(
        "ko2024distillm",
        "Ko, Jongwoo and others",
        "DistiLLM: Towards Streamlined Distillation for Large Language Models",
        2024,
    ),
    "2402.12030": Paper(
        "boizard2024uld",
        "Boizard, Nicolas and others",
        "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs",
        2024,
    ),
    "2402.17110": Paper(
        "cui2024sinkhorn",
        "Cui, Xiao and others",
        "Sinkhorn Distance Minimization for Knowledge Distillation",
        2024,
    ),
    "2403.01427": Paper(
        "sun2024logit",
        "Sun, Shangquan and others",
        "Logit Standardization in Knowledge Distillation",
        2024,
    ),
    "2403.07854": Paper(
        "benbaruch2024distilling", "Ben-Baruch, Emanuel and others", "Distilling the Knowledge in Data Pruning", 2024
    ),
    "2404.02657": Paper(
        "wu2024rethinking",
        "Wu, Taiqiang and others",
        "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models",
        2024,
    ),
    "2406.09719": Paper(
        "park2024self", "Park, Hancheol and others", "Self-Knowledge Distillation for Learning Ambiguity", 2024
    ),
    "2406.14208": Paper(
        "wang2024secokd",
        "Wang, Weixing and others",
        "SeCoKD: Aligning Large Language Models for In-Context Learning with Fewer Shots",
        2024,
    ),
    "2407.16154": Paper(
        "liu2024ddk",
        "Liu, Jiaheng and others",
        "DDK: Distilling Domain Knowledge for Efficient Large Language Models",
        2024,
    ),
    "2411.08028": Paper(
        "li2024learning",
        "Li, Juanhui and others",
        "Learning with Less: Knowledge Distillation from Large Language Models via Unlabeled Data",
        2024,
    ),
    "2505.18116": Paper(
        "chen2025bridging",
        "Chen, Huayu and others",
        "Bridging Supervised Learning and Reinforcement Learning in Math Reasoning",
        2025,
    ),
    "2506.02208": Paper(
        "xu2025kdrl",
        "Xu, Hongling and others",
        "KDRL: Post-Training Reasoning LLMs via Unified Knowledge Distillation and Reinforcement Learning",
        2025,
    ),
    "2506.07851": Paper(
        "guo2025learning",
        "Guo, Yiju and others",
        "Learning to Focus: Causal Attention Distillation via Gradient-Guided Token Pruning",
        2025,
    ),
}


def arxiv_ids(words: str) -> list[str]:
    """The arXiv numbers in a text, in their order."""
    return re.findall(r"arxiv\.org/abs/(\d{4}\.\d{4,5})", words)


def bibtex(ids: Iterable[str]) -> str:
    """The entries of the papers that are known here, one after the other."""
    return "\n\n".join(_entry(one, PAPERS[one]) for one in dict.fromkeys(ids) if one in PAPERS)


def _entry(arxiv: str, paper: Paper) -> str:
    fields = {
        "title": paper.title,
        "author": paper.authors,
        "year": str(paper.year),
        "eprint": arxiv,
        "archivePrefix": "arXiv",
        "url": f"https://arxiv.org/abs/{arxiv}",
    }
    lines = ",\n".join(f"  {name:<13} = {{{content}}}" for name, content in fields.items())
    return f"@misc{{{paper.key},\n{lines}\n}}"
