"""Log-probabilities of a model on rows of tokens: where `models` meets `logprobs`."""

from jaxtyping import Array, Float, Int

from jaxrl_reason.logprobs import chunked_token_logprobs
from jaxrl_reason.models import Model, Params

_LOGITS = 2**27


def model_logprobs(
    model: Model,
    params: Params,
    tokens: Int[Array, "B T"],
    *,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    temperature: float,
    chunk_size: int | None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """`chunked_token_logprobs` of a model on rows of tokens: `(logprobs, entropy)`.

    Without a `chunk_size` as many logits exist at once as make 512 MiB in float32.
    """
    hidden, _ = model.forward(params, tokens, positions=positions, segment_ids=segment_ids)
    head = model.unembedding(params)
    if chunk_size is None:
        chunk_size = max(1, _LOGITS // head.shape[1])
    return chunked_token_logprobs(
        hidden, head, tokens, temperature=temperature, chunk_size=chunk_size
    )
