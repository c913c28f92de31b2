"""--compile: which parts of a detector go through torch.compile, and that none of them breaks."""

import torch
from methods import make, small

import d2det
from baselines import retinanet


def test_compiled_are_backbone_and_heads(monkeypatch):
    """Once each, of a head that training takes apart its parts; a list's parts one by one."""
    model, seen = small(d2det, conv_channels=16, num_convs=2, groups=4), []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: seen.append(self))
    model.compile_parts()
    drp = [part for level in model.drp for part in (level.fc, level.pool)]
    want = [model.backbone, model.rpn, model.regress.trunk, *drp, model.classify]
    assert [id(m) for m in seen] == [id(m) for m in want]


def test_a_head_compiles_whole_and_for_all_sizes():
    """fullgraph: a graph break raises. A second program is for maps of one cell; that is all."""
    head, graphs = make(retinanet).head, []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    head.compile(backend=backend, dynamic=True, fullgraph=True)
    for size in (4, 8, 6, 12):
        features = [torch.rand(2, 16, s, s + 1) for s in (size, size // 2)]
        eager = type(head).forward(head, features)
        for got, want in zip(head(features)[:2], eager):
            assert torch.equal(got, want)
    assert 1 <= len(graphs) <= 2
