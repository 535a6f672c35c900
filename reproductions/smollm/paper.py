"""What the paper reports (Chakraborty et al., arXiv 2402.08925 v2), to stand beside our numbers."""

__all__ = ["ACCURACY", "FIGURE_5", "WIN_RATES"]

#: Table 1, single reward on P1A and P1B: ratio -> accuracy in total, of the majority, of the minority
ACCURACY = {
    1: (0.686, 0.668, 0.704),
    2: (0.608, 0.728, 0.488),
    6: (0.588, 0.724, 0.452),
    10: (0.568, 0.716, 0.420),
}
_CODES = ("P1A", "P1B", "P2A", "P2B", "P3A", "P3B")
#: Tables 2 and 3, GPT-4's win rate against Tulu2-7B on 50 prompts of Koala: policy -> code -> rate
WIN_RATES = {
    policy: dict(zip(_CODES, rates, strict=True))
    for policy, rates in {
        "maxmin": (0.5750, 0.6000, 0.5450, 0.5600, 0.5778, 0.5556),
        "single 1": (0.5600, 0.5197, 0.5373, 0.5400, 0.5585, 0.5262),
        "single 2": (0.5778, 0.4400, 0.5555, 0.5172, 0.5556, 0.4889),
        "single 6": (0.5481, 0.4800, 0.5214, 0.4940, 0.5806, 0.4667),
        "single 10": (0.5511, 0.4508, 0.5396, 0.4598, 0.5600, 0.4500),
    }.items()
}
#: Figure 5, read off its bars: policy -> average sentiment, average conciseness (both higher is better)
FIGURE_5 = {"sft": (-0.5, 8.0), "single": (2.0, 10.0), "maxmin": (1.5, 25.0)}
