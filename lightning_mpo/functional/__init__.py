"""The equations, as pure functions of tensors. Its files import torch and each other, and nothing
else of this package.

=======================  ==========================================================================
``heads``                hidden states -> log-probabilities and entropies, in chunks
``head_coefficients``    the coefficients of the policy loss of multi-token heads
``head_gradients``       their hand-written gradients
``head_logits``          an unembedding, and the form of its logits
``head_positions``       the positions to compute, flattened and back
``low_rank``             a LoRA adapter on the unembedding
``sharded_rows``         rows of an unembedding that is spread over processes
``ranking``              ranks of tokens and the top k, over the whole vocabulary
``supports``             logits -> promising sets
``actions``              token log-ratios -> action log-ratios
``future_credit``        advantages of the future tokens of a block
``traces``               products of token ratios along a response
``block_weights``        weights of tokens within a block
``segments``             where blocks of unequal length begin and end
``advantages``           rewards -> advantages
``decoupled``            several rewards -> advantages, each normalised within the group
``prefix_tree``          credit for the tokens at which completions of a prompt part
``preferences``          pairs of a better and a worse response, and the loss of DPO
``groups``               which groups of completions tell right from wrong
``curriculum``           success rates of training rows -> weights, and draws by them
``selections``           which tokens of a response carry gradient
``lengths``              the length of a response -> a penalty
``repetition``           the share of a response that repeats itself
``surrogates``           (log-ratio, advantage) -> loss of each action
``linear_bound``         a bound of the surrogate that is a sum over noised samples
``noise``                hidden tokens of noised copies, and the weights of their log-probs
``position_clips``       a clip whose range depends on the position in a response
``trust_regions``        how far the distribution behind a token has moved since it was sampled
``corrections``          importance weights for a sampler that differs from the trainer
``values``               the loss of a critic
``divergences``          how far two policies are apart: k1, k2, k3, exact on a support
``reductions``           masked sums with an explicit denominator
``diagnostics``          clip fraction, effective sample size, signal and noise
``head_diagnostics``     calibration of multi-token heads, and the gradient that they send into the trunk
``support_diagnostics``  kept mass, overlap, score variance, responses that could not stop
``support_shift``        contexts that training won and lost, and their ratio
``design``               scores of designed properties, and the composition of a sequence
``chains``               chains of subproblems: the share that is solved to the end
``thoughts``             rewards of thoughts: what they add to the likelihood of a line
``logistic``             a classifier by logistic regression
``evaluation``           pass@k, maj@k, and intervals over problems
``shapes``               the checks that name the argument
=======================  ==========================================================================

docs/algorithms.md 1.4 leads from a YAML key to its functions. Letters (docs/algorithms.md 1.2): B
rows, T response tokens, U = T actions (one stands at its first token), V vocabulary, K support
size, N block length or a flat number of positions, M = N - 1 future offsets, D hidden size.
"""
