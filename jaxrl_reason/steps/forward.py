"""Log-probabilities of a model on rows of tokens: where `models` meets `logprobs`."""

from jaxtyping import Array, Float, Int

from jaxrl_reason.logprobs import chunked_token_logprobs
from jaxrl_reason.models import Model, Params


def model_logprobs(
    model: Model,
    params: Params,
    tokens: Int[Array, "B T"],
    *,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    temperature: float,
    chunk_size: int,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """`chunked_token_logprobs` of a model on rows of tokens: `(logprobs, entropy)`."""
    hidden, _ = model.forward(params, tokens, positions=positions, segment_ids=segment_ids)
    return chunked_token_logprobs(
        hidden, model.unembedding(params), tokens, temperature=temperature, chunk_size=chunk_size
    )
