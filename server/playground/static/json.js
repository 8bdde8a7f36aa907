// JSON with integers of any size: a number is exact up to 2^53 only, and a seed goes up to 2^64 - 1.

/** As JSON.stringify, of plain values; a BigInt as its digits. */
export function stringify(value) {
  if (typeof value === "bigint") return String(value);
  if (Array.isArray(value)) return `[${value.map((one) => stringify(one) ?? "null").join(",")}]`;
  if (value === null || typeof value !== "object") return JSON.stringify(value);
  const members = Object.entries(value).filter(([, one]) => one !== undefined);
  return `{${members.map(([name, one]) => `${JSON.stringify(name)}:${stringify(one)}`).join(",")}}`;
}

/** The number that a text says: a BigInt where a number would be another one. */
export function exactNumber(text) {
  const number = Number(text);
  return /^[+-]?\d+$/.test(text) && !Number.isSafeInteger(number) ? BigInt(text) : number;
}

/** A text that `restored` makes the same value of: JSON.parse alone would round a BigInt's digits. */
export const kept = (value) =>
  JSON.stringify(value, (name, one) => (typeof one === "bigint" ? { digits: String(one) } : one));

export const restored = (text) =>
  JSON.parse(text, (name, one) => (typeof one?.digits === "string" ? BigInt(one.digits) : one));
