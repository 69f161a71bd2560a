"""benchmarks/share.py compares like with like: its peers save what they say, and its rows are read from any machine."""

import pytest
import timm
import torch
from hub_project import ROOT
from models import slow_but_for

NETS = {
    'preact': ('resnet164_cifar', {'layers': (2, 2, 2)}),
    'wide': ('wrn40_4', {'widen_factor': 1, 'layers': (2, 2, 2)}),
    'bottleneck': ('resnet50', {'channels': (8, 16, 16, 32), 'layers': (1, 2, 2, 2), 'num_classes': 10}),
    'basic': ('resnet34', {'channels': (8, 16, 16, 32), 'layers': (1, 2, 2, 2), 'num_classes': 10}),
}


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'tests' / 'benchmarks'))
    import peers

    return peers


@pytest.fixture
def share_tables(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'tests' / 'benchmarks'))
    import share_tables

    return share_tables


@pytest.fixture
def images():
    return torch.randn(4, 32, 3, 32, 32, generator=torch.Generator().manual_seed(0)).unbind()


def plain_net(kind, images):
    """With statistics of the images."""
    torch.manual_seed(0)
    name, kwargs = NETS[kind]
    model = timm.create_model(name, **kwargs).train()
    if kind in ('bottleneck', 'basic'):
        model.init_weights(zero_init_last=False)
    with torch.no_grad():
        for batch in images:
            model(batch)
    return model.eval()


@slow_but_for('bottleneck', 'basic', of=NETS)
def test_peers_save_what_is_asked_for_and_little_more(peers, images, kind):
    plain = plain_net(kind, images)
    moments = peers.Moments(plain, images)
    before, whole = plain(images[0]), sum(p.numel() for p in plain.parameters())
    for what, spread in ('low-rank', 'harm'), ('low-rank', 'last'), ('pruned', 'uniform'), ('pruned', 'harm'):
        model = peers.peer(what, plain, moments, 0.2, spread, images)
        assert 0.2 <= 1 - sum(p.numel() for p in model.parameters()) / whole < 0.22
        assert model(images[0]).isfinite().all()
    assert torch.equal(plain(images[0]), before)


def test_low_rank_of_all_ranks_is_the_convolution(peers, images):
    plain = plain_net('preact', images)
    ranks = peers._Ranks('layer2', 1, plain.layer2[1], 'conv2', peers.Moments(plain, images))
    ranks.start(32)
    ranks.taken = 1
    x = torch.randn(2, 32, 8, 8)
    torch.testing.assert_close(ranks.factors()(x), plain.layer2[1].conv2(x), atol=1e-4, rtol=1e-4)


def test_pruned_channels_are_those_that_others_replace(peers):
    """Of five inputs the third is the sum of two others, and nothing is lost without one of these three."""
    x = torch.randn(5, 100, dtype=torch.float64)
    x[2] = x[0] + x[1]
    order, lost = peers.eliminate(torch.randn(3, 5, dtype=torch.float64), peers.ridge(x @ x.T / 100, 1e-9), 1)
    assert order[0] in (0, 1, 2) and lost[0] < 1e-6 < 1e-2 < lost[1] < lost[-1]


def test_rows_of_all_machines_are_read_and_those_of_older_files_have_empty_columns(share_tables, tmp_path, monkeypatch):
    monkeypatch.setattr(share_tables, 'RESULTS', tmp_path)
    (tmp_path / 'share-A.csv').write_text('net,seed,what,top1\nwide-40,0,plain,78\n')
    (tmp_path / 'share-B.csv').write_text('net,seed,what,top1,spread\nwide-40,1,pruned,77,harm\n')
    old, new = share_tables.read()
    assert (old['spread'], new['spread'], old['top1'], new['seed']) == ('', 'harm', '78', '1')
