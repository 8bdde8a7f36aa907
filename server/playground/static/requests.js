// The request on screen: the state as a body of the API, and the API's events as tokens.

import { forModel } from "./api.js";

/** Path and body of the streamed request to one precision. */
export function requestFor(state, precision, seed) {
  const parameters = { ...(seed !== undefined && { seed }), ...state.parameters };
  if (state.mode === "chat") {
    return {
      path: forModel("v1/chat/completions", state.model),
      body: { messages: messagesOf(state), precision, stream: true, ...parameters },
    };
  }
  return { path: forModel("generate_stream", state.model), body: { inputs: state.prompt, parameters, precision } };
}

/** The messages of a chat: the system's, if there is one, the conversation, and the user's next. */
export function messagesOf({ system, messages, prompt }) {
  const first = system.trim() ? [{ role: "system", content: system }] : [];
  return [...first, ...messages, { role: "user", content: prompt }];
}

/** A seed for all precisions of a run, below 2^52 as the server's own. */
export function drawSeed() {
  const [high, low] = crypto.getRandomValues(new Uint32Array(2));
  return (high % 2 ** 20) * 2 ** 32 + low;
}

/**
 * One event of either dialect: `{tokens, finish, timings}`, the last with the reason to finish. A token is
 * `{key, text, logprob, top}`; equal keys are the same token of the vocabulary.
 */
export function parseEvent(event) {
  if (event.choices) return { ...chatChunk(event.choices[0]), timings: event.timings };
  const { token, top_tokens: top = [] } = event;
  const own = { key: token.id, text: token.text, logprob: token.logprob, special: token.special };
  const others = top.map(({ id, text, logprob }) => ({ key: id, text, logprob }));
  const finish = event.details?.finish_reason ?? null;
  return { tokens: [{ ...own, top: others }], finish, timings: event.timings };
}

function chatChunk(choice) {
  if (!choice) return { tokens: [], finish: null };
  const { role, content } = choice.delta ?? {};
  const text = content ?? "";
  const [first, ...more] = choice.logprobs?.content ?? [];
  const finish = choice.finish_reason ?? null;
  if (first) {
    const rest = more.map((entry) => chatToken(entry, ""));
    return { tokens: [chatToken(first, text), ...rest], finish };
  }
  // without log-probabilities a chunk is a token, of which the text alone is known; the first has the role, and none
  const isToken = content !== undefined && role === undefined;
  return { tokens: isToken ? [{ key: text, text, logprob: null, top: [] }] : [], finish };
}

function chatToken(entry, text) {
  const top = (entry.top_logprobs ?? []).map((other) => ({ ...other, text: other.token, key: keyOf(other) }));
  return { key: keyOf(entry), text, name: entry.token, logprob: entry.logprob, top };
}

const keyOf = ({ bytes, token }) => (bytes ? bytes.join() : token);
