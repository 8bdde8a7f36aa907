// Figures and texts as people read them.

const UNITS = ["B", "kB", "MB", "GB", "TB"];

/** The unit for so many bytes, `{name, size}`: of which three digits are not a thousand. */
export function unitOf(count) {
  let [index, size] = [0, 1];
  while (count >= 999.5 * size && index < UNITS.length - 1) {
    index += 1;
    size *= 1000;
  }
  return { name: UNITS[index], size };
}

export function bytes(count) {
  if (count === null || count === undefined) return "–";
  const { name, size } = unitOf(count);
  return `${size > 1 ? (count / size).toPrecision(3) : count} ${name}`;
}

export function milliseconds(value) {
  if (value === null || value === undefined) return "–";
  return value < 1000 ? `${value.toFixed(value < 10 ? 1 : 0)} ms` : `${(value / 1000).toFixed(2)} s`;
}

export function rate(value) {
  return value === null || value === undefined ? "–" : `${value.toFixed(value < 100 ? 1 : 0)} tokens/s`;
}

/** A log-probability as a percentage with enough digits. */
export function percent(logprob) {
  const value = 100 * Math.exp(logprob);
  return `${value >= 10 ? value.toFixed(1) : value.toPrecision(2)} %`;
}

// Controls that a terminal or the bidirectional algorithm obeys: shown, so that the text reads as it is.
const CONTROLS = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/gu;

/** The text with its control characters as visible ones: ␛ for escape, ⟨U+202E⟩ for an override. */
export function visible(text) {
  return text.replace(CONTROLS, (control) => {
    const code = control.codePointAt(0);
    if (code < 0x20) return String.fromCodePoint(0x2400 + code);
    return code === 0x7f ? "\u2421" : `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
  });
}

/** A JSON text of the same value whose control characters are escapes: as code it is what it looks like. */
export function escaped(json) {
  return json.replace(CONTROLS, (control) => `\\u${control.charCodeAt(0).toString(16).padStart(4, "0")}`);
}

/** A token alone: line ends and blanks visible too. */
export function quoted(text) {
  return `“${visible(text).replaceAll("\n", "⏎").replaceAll("\t", "⇥")}”`;
}
