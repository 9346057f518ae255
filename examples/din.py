"""DIN, the deep interest network (Zhou et al., KDD 2018, arXiv 1706.06978), in Flax NNX.

A small one: its attention weighs each item of a user's history by how it goes with the item on offer. As in the paper
the weights are no softmax, so that a history with more clicks of the kind counts for more. Rows of embedding tables
enter as an input.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from dlrm import MultilayerPerceptron


class DIN(nnx.Module):
    """Attention over the history's items, and an MLP over all vectors to one logit.

    Args:
        item_dim: width of an item's row.
        category_dim: width of a category's row.
        user_dim: width of a user's row.
        rngs: source of the initial weights.
    """

    def __init__(self, item_dim: int, category_dim: int, user_dim: int, *, rngs: nnx.Rngs) -> None:
        self.attention = MultilayerPerceptron((3 * item_dim, 32, 1), final_relu=False, rngs=rngs)
        width = 3 * item_dim + 3 * category_dim + user_dim
        self.top = MultilayerPerceptron((width, 64, 32, 1), final_relu=False, rngs=rngs)

    def __call__(self, rows: Mapping[str, jax.Array], present: jax.Array) -> jax.Array:
        """Return logits [B].

        Args:
            rows: "user" [B, user_dim], "item" [B, item_dim], "history" [B, L, item_dim], "category" [B, category_dim]
                and the mean "history_categories" [B, category_dim].
            present: which entries of the history are clicks, bool [B, L].
        """
        item, history = rows["item"], rows["history"]
        query = jnp.broadcast_to(item[:, None], history.shape)
        weight = self.attention(jnp.concatenate([query, history, query * history], axis=-1))
        interest = jnp.sum(weight * history, axis=1, where=present[:, :, None])
        category, categories = rows["category"], rows["history_categories"]
        vectors = [rows["user"], item, interest, item * interest, category, categories, category * categories]
        return self.top(jnp.concatenate(vectors, axis=1))[:, 0]
