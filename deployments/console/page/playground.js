// Two models, one prompt: both answers as they stream.

import { apiKey, byId, events, headers, make, number, put, refusal, whole } from "./page.js";

// ---- playground: choosing a model ------------------------------------------------------------------------

const SHOWN = 50;
let models = null; // names, in lower case beside them; asked for when first needed, and anew with another key

apiKey.addEventListener("change", () => { models = null; });

async function listModels() {
  if (!models) {
    const response = await fetch("v1/models", { headers: headers() });
    if (!response.ok) throw new Error(await refusal(response));
    models = (await response.json()).data.map(({ id }) => [id.toLowerCase(), id]);
  }
  return models;
}

/** A text field with the models that match it below, as in the ARIA practices' combobox. */
class Chooser {
  constructor(side, label) {
    this.list = make("ul", { id: `choices-${side}`, className: "choices", role: "listbox", hidden: true, "aria-label": "Models" });
    this.input = make("input", {
      id: `model-${side}`, type: "text", autocomplete: "off", spellcheck: false, placeholder: "type to search",
      role: "combobox", "aria-autocomplete": "list", "aria-expanded": "false", "aria-controls": this.list.id,
    });
    this.box = make("label", {}, label, this.input);
    this.at = -1;
    this.input.addEventListener("focus", () => this.open(""));
    this.input.addEventListener("input", () => this.open(this.input.value));
    this.input.addEventListener("blur", () => this.close());
    this.input.addEventListener("keydown", (event) => this.key(event));
    // Not click: the field would lose its focus first.
    this.list.addEventListener("mousedown", (event) => {
      event.preventDefault();
      const option = event.target.closest("[role=option]");
      if (option) this.choose(option);
    });
  }

  async open(text) {
    let known;
    try {
      known = await listModels();
    } catch (error) {
      return say(error.message);
    }
    if (document.activeElement !== this.input) return;
    const wanted = text.toLowerCase();
    const found = [];
    let more = 0;
    for (const [lower, name] of known) {
      if (!lower.includes(wanted)) continue;
      if (found.length < SHOWN) found.push(name); else more += 1;
    }
    const options = found.map((name, at) => make("li", { id: `${this.list.id}-${at}`, role: "option", "aria-selected": "false", title: name }, name));
    const rest = more ? [make("li", { className: "more", role: "presentation" }, `and ${whole.format(more)} more: type to narrow down`)] : [];
    this.list.replaceChildren(...options, ...rest);
    this.list.hidden = !options.length;
    this.input.setAttribute("aria-expanded", String(!this.list.hidden));
    this.mark(-1);
  }

  close() {
    this.list.hidden = true;
    this.input.setAttribute("aria-expanded", "false");
    this.input.removeAttribute("aria-activedescendant");
  }

  mark(at) {
    const options = this.list.querySelectorAll("[role=option]");
    this.at = at;
    options.forEach((option, index) => option.setAttribute("aria-selected", String(index === at)));
    if (at < 0) return this.input.removeAttribute("aria-activedescendant");
    this.input.setAttribute("aria-activedescendant", options[at].id);
    return options[at].scrollIntoView({ block: "nearest" });
  }

  choose(option) {
    this.input.value = option.textContent;
    this.close();
  }

  key(event) {
    const options = this.list.querySelectorAll("[role=option]");
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (this.list.hidden) this.open(this.input.value);
      else if (event.key === "ArrowDown") this.mark((this.at + 1) % options.length);
      else this.mark(this.at > 0 ? this.at - 1 : options.length - 1);
    } else if (event.key === "Enter" && !this.list.hidden && options[this.at]) {
      event.preventDefault();
      this.choose(options[this.at]);
    } else if (event.key === "Escape") this.close();
  }
}

// ---- playground: asking ----------------------------------------------------------------------------------

const MOST_TEXT = 200_000; // characters of an answer that are shown

class Side {
  constructor(side, label) {
    this.chooser = new Chooser(side, label);
    this.output = make("pre", { id: `output-${side}`, className: "output", tabIndex: 0, "aria-label": `Answer of the ${label.toLowerCase()}` });
    this.figures = make("p", { id: `figures-${side}`, className: "figures quiet" });
    this.box = make("div", { className: "side" }, this.chooser.box, this.chooser.list, this.output, this.figures);
    byId("sides").append(this.box);
  }

  /** Stream one answer; resolves to what is to be said of it. */
  async run(path, body, signal) {
    const model = this.chooser.input.value.trim();
    this.output.classList.remove("failed");
    const text = document.createTextNode("");
    this.output.replaceChildren(text);
    put(this.figures, "waiting for the first token…");
    const start = performance.now();
    let first = null, last = start, tokens = 0, usage = null;
    const show = (done) => {
      if (first === null) return;
      const seconds = (last - first) / 1000;
      const count = usage ?? tokens;
      const rate = seconds > 0 && count > 1 ? number((count - 1) / seconds) : "–";
      put(this.figures, `first token ${number(first - start)} ms · ${rate} tokens/s · ${count} tokens${done ? ` · ${done}` : ""}`);
    };
    let ended = "";
    try {
      const response = await fetch(path, {
        method: "POST", signal, headers: headers({ "Content-Type": "application/json" }),
        body: JSON.stringify({ ...body, model, stream: true, stream_options: { include_usage: true } }),
      });
      if (!response.ok) throw new Error(await refusal(response));
      for await (const data of events(response)) {
        if (data === "[DONE]") break;
        const event = JSON.parse(data);
        if (event.error) throw new Error(event.error.message);
        if (event.usage) usage = event.usage.completion_tokens;
        const choice = event.choices?.[0];
        const piece = choice?.delta?.content ?? choice?.text ?? "";
        if (choice?.finish_reason) ended = choice.finish_reason;
        if (!piece) continue;
        last = performance.now();
        first ??= last;
        tokens += 1;
        if (text.length < MOST_TEXT) text.appendData(piece.slice(0, MOST_TEXT - text.length));
        this.output.scrollTop = this.output.scrollHeight;
        show("");
      }
      show(ended);
      if (first === null) put(this.figures, `no text · ${ended}`);
      return `${model || "no model"}: done`;
    } catch (error) {
      if (signal.aborted) {
        show("stopped");
        if (first === null) put(this.figures, "stopped");
        return `${model}: stopped`;
      }
      this.output.classList.add("failed");
      this.output.append(`${text.length ? "\n" : ""}${error.message}`);
      put(this.figures, "failed");
      return `${model || "no model"}: failed`;
    }
  }
}

const sides = [new Side("left", "Left model"), new Side("right", "Right model")];
let asking = null;

function say(text) {
  put(byId("playground-status"), text);
}

async function send() {
  if (asking) return;
  const chat = document.querySelector("input[name=kind]:checked").value === "chat";
  const prompt = byId("prompt").value;
  const body = chat ? { messages: [{ role: "user", content: prompt }] } : { prompt };
  for (const [id, field] of [["max-tokens", "max_tokens"], ["temperature", "temperature"], ["seed", "seed"]]) {
    if (!byId(id).checkValidity()) { byId(id).reportValidity(); return; }
    if (byId(id).value !== "") body[field] = Number(byId(id).value);
  }
  asking = new AbortController();
  byId("send").disabled = true;
  byId("stop").disabled = false;
  say("Streaming…");
  const path = chat ? "v1/chat/completions" : "v1/completions";
  const outcomes = await Promise.all(sides.map((side) => side.run(path, body, asking.signal)));
  asking = null;
  byId("send").disabled = false;
  byId("stop").disabled = true;
  say(outcomes.join("; "));
}

byId("send").addEventListener("click", send);
byId("stop").addEventListener("click", () => asking?.abort());
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send();
});
