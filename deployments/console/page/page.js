// What both halves of the page use. Whatever comes from the server becomes text, never markup.

export const byId = (id) => document.getElementById(id);
export const apiKey = byId("api-key"); // read where it is needed; kept nowhere else

/** An element with properties (data-, aria- and role as attributes) and children (strings become text). */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

/** Change only what differs, so that selections, focus and transitions outlive an update. */
export function put(element, text, property = "textContent") {
  if (element[property] !== text) element[property] = text;
}

export const headers = (more = {}) => (apiKey.value ? { ...more, Authorization: `Bearer ${apiKey.value}` } : more);
export const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
export const fine = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
export const number = (value) => (value === null || value === undefined ? "–" : (value < 100 ? fine : whole).format(value));

/** The data of server-sent events of a response, one after the other. */
export async function* events(response) {
  const decoder = new TextDecoder();
  let rest = "";
  for await (const bytes of chunks(response.body)) {
    const lines = (rest + decoder.decode(bytes, { stream: true })).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: ")) yield line.slice(6);
  }
}

async function* chunks(body) {
  const reader = body.getReader();
  try {
    for (let part = await reader.read(); !part.done; part = await reader.read()) yield part.value;
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** What went wrong, in the server's words where it has any. */
export async function refusal(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered with status ${response.status}`;
  }
}
