"""Chat models: families, hooks, conversations as tokens, adapters, and the passes that everything here is made of.

- `architectures`: all that depends on a model family; `hooks`: hook points and layers
- `chat`, `templates`: conversations as tokens, spans and batches
- `chat_model`: `ChatModel`; `pretrained`: folders and hub; `checks`: what is tried at load
- `adapters`, `bridges`: PEFT and TransformerBridge over its weights; `attaching`: theta by hooks
- `weights`: hashes of what acts; `losses`: NLL and KL; `memory`: batches that fit; `precision`: float64
- `partial_pass`: running from a cached residual; `ranks`: passes that several processes share

**Layer** *l*, counted from 0, is the output of block *l*: TransformerLens `blocks.{l}.hook_out`, Hugging Face
`hidden_states[l+1]`, except that the last entry of `hidden_states` is after the final norm and is no layer.

**A response** runs from the first token after the generation prompt to the end-of-turn token, included. Both are found
by comparing renderings of the chat template and proved when the model is loaded; what a template appends after the last
turn (Phi-3's end of text) is not scored. Special tokens inside a message are refused.

**Text longer than a model was made for** is refused everywhere (with LongRoPE: longer than the original length).

**A base, an adapter and a TransformerBridge** are each proved at load, on logits, and a chat template on chats of two
turns; what is not understood is refused. `tests/matrix/README.md` lists families, adapter features and templates, each
equal to a float64 oracle or refused with its remedy.
"""
