from model.transformer import Memory3LM
from tests.support.train import model_config
from train.optim import parameter_groups


def test_matrices_decay_norms_and_embeddings_do_not() -> None:
    model = Memory3LM(model_config())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, kept = parameter_groups(model, 0.3)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    for parameter in decayed["params"]:
        assert parameter.ndim == 2, names[id(parameter)]
        assert "embedding" not in names[id(parameter)]
    assert any("embedding" in names[id(parameter)] for parameter in kept["params"])
    assert all(parameter.ndim < 2 or "embedding" in names[id(parameter)] for parameter in kept["params"])


def test_every_parameter_stands_in_one_group_once_and_in_the_same_order_every_time() -> None:
    model = Memory3LM(model_config())
    grouped = [id(p) for group in parameter_groups(model, 0.1) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert grouped == [id(p) for group in parameter_groups(model, 0.1) for p in group["params"]]
