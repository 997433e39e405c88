"""Built pages show no raw LaTeX and load nothing from another host."""

import pytest

from scripts.docs_math import faults


@pytest.mark.parametrize(
    "page",
    [
        r"<p>the rate \(\eta\)</p>",
        r"<div>\[x^2\]</div>",
        "<p>$$x$$</p>",
        r"<td>\theta</td>",
        '<script src="https://cdn.jsdelivr.net/npm/mathjax@3/es5/tex-chtml.js"></script>',
        "<script async src=//cdn.example/x.js></script>",
        '<link rel="stylesheet" href="https://fonts.googleapis.com/css">',
        '<link href="https://fonts.gstatic.com" rel="preconnect">',
        "<style>@font-face {src: url(https://fonts.example/a.woff2)}</style>",
        '<img src="http://example.com/a.png">',
    ],
)
def test_raw_latex_and_other_hosts_are_found(page: str):
    assert len(faults(page)) >= 1


@pytest.mark.parametrize(
    "page",
    [
        "<p><math><mi>x</mi></math> costs $5</p>",
        r"<pre>re.compile(r'\(')</pre><p><code>$$</code></p>",
        '<a href="https://arxiv.org/abs/2305.17333">paper</a>',
        '<script src="assets/a.js"></script><link rel="stylesheet" href="../b.css">',
        '<link rel="canonical" href="https://example.com/">',
    ],
)
def test_what_a_browser_draws_by_itself_is_no_fault(page: str):
    assert faults(page) == []


def test_formulas_become_mathml():
    pytest.importorskip("latex2mathml", reason="needs PyTorch, and the docs extra beside it")
    from scripts.docs_math import mathml

    for latex in (r"\hat\nabla L", r"\|H\|", r"K_{FT}", r"\bar\eta_E"):
        found = mathml(latex)
        assert found.startswith("<math")
        assert "\\" not in found
    assert 'form="prefix">&#x0007C;</mo><mi>g</mi>' in mathml(r"\tau \max |g|")  # no space within
    assert mathml(r"x'").count("&#x02032;") == 1
    assert "<msup>" not in mathml(r"x'")
    with pytest.raises(ValueError, match="no MathML"):
        mathml(r"\nosuchcommand")
