// The parameters of /generate as those of /v1/completions, whose names and defaults are OpenAI's.

const DEFAULT_TOKENS = 64; // of /generate; OpenAI's is 16
const MOST_HEAT = 2;
const SAMPLING = ["temperature", "top_k", "top_p", "typical_p", "min_p"]; // each of them samples, if set
const RENAMED = { max_new_tokens: "max_tokens", truncate: "truncate_prompt_tokens", top_n_tokens: "logprobs" };

/** `{parameters, lacking}`: the second are the names of those that /v1/completions has not. */
export function asCompletion(native) {
  const { do_sample: samples = false, typical_p: typical, ...same } = native;
  const isGreedy = !samples && SAMPLING.every((name) => native[name] === undefined);
  const parameters = { max_tokens: DEFAULT_TOKENS };
  for (const [name, value] of Object.entries(same)) parameters[RENAMED[name] ?? name] = value;
  if (isGreedy) parameters.temperature = 0; // OpenAI's default samples
  const lacking = typical === undefined ? [] : ["typical_p"];
  if (native.temperature > MOST_HEAT) lacking.push(`temperature above ${MOST_HEAT}`);
  return { parameters, lacking };
}
