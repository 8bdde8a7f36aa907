// How far a precision's answer is from the reference's, token by token.
//
// As long as both answers have the same tokens, both models have read the same text, and the difference of
// their log-probabilities of one token is a difference of the models. At the first token that differs it is
// that of the chosen token, if the reference lists it among its likeliest. Later tokens follow different
// texts: they are not compared.

export const HEAT = [0.02, 0.1, 0.3, 0.7, 1.5]; // nats; a shade each

/**
 * The comparison at one position: `{same, difference}`, `difference` null where it can't be known.
 * `reference` is undefined where the reference's answer has ended.
 */
export function compareTokens(own, reference) {
  if (reference === undefined) return { same: false, difference: null };
  const same = own.key === reference.key;
  const twin = same ? reference : reference.top.find((token) => token.key === own.key);
  if (!twin || own.logprob === null || twin.logprob === null) return { same, difference: null };
  return { same, difference: Math.abs(own.logprob - twin.logprob), logprob: twin.logprob };
}

/** The shade of a difference, from 0 for none. */
export function heat(difference) {
  return HEAT.filter((limit) => difference >= limit).length;
}

/** Compares an answer with the reference's as both grow. */
export class Tracker {
  #at = 0;
  first = null; // index of the first token that differs

  /** The comparisons newly possible, as `[index, comparison]`. `ended`: the reference has all its tokens. */
  *advance(own, reference, ended) {
    while (this.first === null && this.#at < own.length) {
      const index = this.#at;
      if (index >= reference.length && !ended) return;
      const comparison = compareTokens(own[index], reference[index]);
      if (!comparison.same) this.first = index;
      this.#at += 1;
      yield [index, comparison];
    }
  }
}
