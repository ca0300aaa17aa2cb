// What the fleet does, as the server tells it.

import { apiKey, byId, events, fine, headers, make, number, put, refusal, whole } from "./page.js";
import "./playground.js";

const percent = (share) => (share === null ? "–" : `${fine.format(100 * share)} %`);
const mebibytes = (bytes) => `${number(bytes / 2 ** 20)} MiB`;

function since(seconds) {
  if (seconds < 1) return "now";
  if (seconds < 90) return `${Math.round(seconds)} s ago`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min ago` : `${Math.round(seconds / 3600)} h ago`;
}

// ---- tiles -----------------------------------------------------------------------------------------------

const POINTS = 90; // of the line that tokens a second draw
const history = [];
const tiles = new Map();

function tile(name, value, note) {
  if (!tiles.has(name)) {
    const parts = { value: make("dd"), note: make("dd", { className: "note" }) };
    tiles.set(name, parts);
    parts.box = make("div", { className: "tile" }, make("dt", {}, name), parts.value, parts.note);
    byId("tiles").append(parts.box);
  }
  put(tiles.get(name).value, value);
  put(tiles.get(name).note, note);
}

function drawTiles(picture) {
  const all = picture.totals;
  history.push(all.tokens_s ?? 0);
  if (history.length > POINTS) history.shift();
  const states = Object.entries(picture.states).filter(([, count]) => count);
  const draining = picture.replicas.filter((replica) => replica.draining).length;
  const serve = states.map(([state, count]) => `${count} ${state.toLowerCase()}`).join(", ");
  tile("Tokens a second", number(all.tokens_s), "generated, mean of 3 s");
  tile("Rows", `${number(all.running)} / ${number(all.max_rows)}`, "running / room in a step");
  tile("Waiting", number(all.waiting + all.waiting_for_adapter),
    `${number(all.waiting_for_adapter)} for adapters, ${number(picture.waiting_tenants)} tenants`);
  tile("Slot hit rate", percent(all.recent_hit_rate), `last minute; ${percent(all.hit_rate)} since start`);
  tile("Loads a minute", number(all.loads_min), "adapters copied to slots");
  tile("Slots", `${number(all.slots_in_use)} / ${number(all.slots_total)}`, `in use; ${number(all.slots_filled)} filled`);
  tile("Pages", percent(all.pages ? all.pages_used / all.pages : null), `${number(all.pages_used)} of ${number(all.pages)}`);
  tile("Replicas", number(picture.replicas.length), (draining ? `${draining} draining; ` : "") + (serve || "answering"));
  drawLine(tiles.get("Tokens a second").box);
}

function drawLine(box) {
  const space = "http://www.w3.org/2000/svg";
  let line = box.querySelector("polyline");
  if (!line) {
    const svg = document.createElementNS(space, "svg");
    svg.setAttribute("viewBox", `0 0 ${POINTS - 1} 20`);
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("aria-hidden", "true");
    line = document.createElementNS(space, "polyline");
    svg.append(line);
    box.append(svg);
  }
  const top = Math.max(1, ...history);
  line.setAttribute("points", history.map((value, at) => `${POINTS - history.length + at},${19 - (18 * value) / top}`).join(" "));
}

// ---- replicas --------------------------------------------------------------------------------------------

const cards = new Map();

function drawReplicas(replicas) {
  const there = new Set(replicas.map((replica) => replica.id));
  for (const [id, card] of cards) if (!there.has(id)) { card.box.remove(); cards.delete(id); }
  for (const replica of replicas) {
    if (!cards.has(replica.id)) cards.set(replica.id, makeCard(replica));
    drawCard(cards.get(replica.id), replica);
  }
}

function makeCard(replica) {
  const card = { facts: new Map(), slots: [] };
  card.where = make("small");
  card.badge = make("span", { className: "badge", hidden: true }, "draining");
  card.list = make("dl", { className: "facts" });
  card.grid = make("ol", { className: "slots", "aria-label": `Slots of replica ${replica.id}` });
  card.more = make("small", { hidden: true });
  const title = make("h3", {}, make("code", {}, replica.id), card.badge, card.where);
  card.box = make("article", { className: "replica" }, title, card.list, card.grid, card.more);
  byId("replicas").append(card.box);
  return card;
}

function drawCard(card, replica) {
  put(card.where, [replica.node, replica.device, replica.version && `version ${replica.version}`].filter(Boolean).join(" · "));
  card.badge.hidden = !replica.draining;
  card.box.classList.toggle("draining", replica.draining);
  const recent = replica.recent_hits + replica.recent_misses;
  const facts = {
    rows: `${replica.running} / ${replica.max_rows}`,
    waiting: number(replica.waiting) + (replica.waiting ? `, longest ${number(replica.longest_wait_s)} s` : ""),
    "for adapters": number(replica.waiting_for_adapter),
    "tokens/s": number(replica.tokens_s),
    step: `${number(replica.step_ms)} ms`,
    pages: `${number(replica.pages_used)} / ${number(replica.pages)}`,
    "hit rate": percent(recent ? replica.recent_hits / recent : null),
    "loads/min": number(replica.loads_min),
    "host cache": `${number(replica.host_adapters)} adapters, ${mebibytes(replica.host_bytes)} of ${mebibytes(replica.host_budget_bytes)}`,
  };
  for (const [name, text] of Object.entries(facts)) {
    if (!card.facts.has(name)) {
      card.facts.set(name, make("dd"));
      card.list.append(make("div", {}, make("dt", {}, name), card.facts.get(name)));
    }
    put(card.facts.get(name), text);
  }
  while (card.slots.length > replica.slots.length) card.slots.pop().box.remove();
  replica.slots.forEach((slot, at) => {
    if (!card.slots[at]) {
      const parts = { name: make("b"), note: make("span") };
      parts.box = make("li", {}, parts.name, parts.note);
      card.slots[at] = parts;
      card.grid.append(parts.box);
    }
    drawSlot(card.slots[at], slot);
  });
  const left = replica.slots_total - replica.slots.length;
  card.more.hidden = left <= 0;
  put(card.more, `and ${left} slots more`);
}

function drawSlot(parts, [room, name, rank, requests, loaded, pinned, idle]) {
  if (name === undefined) {
    put(parts.box, "slot empty", "className");
    put(parts.name, "empty");
    put(parts.note, `up to rank ${room}`);
    put(parts.box, `empty, for adapters up to rank ${room}`, "title");
    return;
  }
  const state = [loaded ? "" : "loading", pinned ? "pinned" : "", requests ? "busy" : "held"].filter(Boolean);
  put(parts.box, `slot ${state.join(" ")}`, "className");
  put(parts.name, name);
  const use = !loaded ? "on its way" : requests ? `${requests} in use` : since(idle);
  put(parts.note, [`r${rank}`, pinned && "pinned", use].filter(Boolean).join(" · "));
  put(parts.box, `${name}: rank ${rank} in a slot of ${room}, ${pinned ? "pinned, " : ""}${requests ? use : `last used ${use}`}`, "title");
}

// ---- tables ----------------------------------------------------------------------------------------------

function drawCounts(body, entries, none) {
  const most = entries.reduce((sum, [, count]) => sum + count, 0);
  if (!most) {
    body.replaceChildren(make("tr", {}, make("td", { colSpan: 3, className: "quiet" }, none)));
    return;
  }
  body.replaceChildren(...entries.map(([name, count]) => {
    const share = make("meter", { min: 0, max: 1, value: count / most, title: percent(count / most) }, percent(count / most));
    share.setAttribute("aria-label", `${name || "no name"}: share`);
    return make("tr", {}, make("td", { title: name }, name || "(no name)"), make("td", { className: "number" }, whole.format(count)), make("td", {}, share));
  }));
}

function draw(picture) {
  put(byId("base-model"), picture.base_model);
  drawTiles(picture);
  drawReplicas(picture.replicas);
  const routing = Object.entries(picture.routing).sort((one, other) => other[1] - one[1]);
  drawCounts(byId("routing"), routing.map(([reason, count]) => [reason.replaceAll("_", " "), count]), "no request yet");
  drawCounts(byId("tenants"), picture.tenants, "nobody waits");
  put(byId("tenants-count"), picture.waiting_tenants ? `${picture.waiting_tenants} tenants` : "");
  const versions = { ...picture.versions, gateway: picture.gateway };
  const rows = Object.entries(versions).map(([name, value]) => make("tr", {}, make("th", { scope: "row" }, name), make("td", {}, value)));
  if (byId("versions").rows.length !== rows.length) byId("versions").replaceChildren(...rows);
}

// ---- the stream of updates -------------------------------------------------------------------------------

let watching = new AbortController();

function connection(state, text) {
  byId("connection").dataset.state = state;
  put(byId("connection"), text); // announced when it changes, not with every update
}

function problem(text) {
  byId("problem").hidden = !text;
  put(byId("problem"), text);
}

/** Look until told not to. A page that nobody sees asks for nothing. */
async function watch() {
  watching.abort();
  const mine = (watching = new AbortController());
  for (let pause = 1000; !mine.signal.aborted && !document.hidden; pause = Math.min(2 * pause, 15000)) {
    try {
      const response = await fetch("console/events", { headers: headers(), signal: mine.signal, cache: "no-store" });
      if (response.ok) {
        for await (const data of events(response)) {
          const picture = JSON.parse(data);
          problem(picture.error ? picture.error.message : "");
          if (!picture.error) draw(picture);
          connection("live", picture.error ? "Connected, without news" : "Live");
          pause = 500;
        }
        connection("lost", "The stream ended: connecting again…");
      } else {
        const refused = response.status === 401 || response.status === 403;
        problem(await refusal(response));
        connection("lost", refused ? "Not allowed: enter an admin key" : "No updates: trying again…");
        if (refused) return;
      }
    } catch (error) {
      if (mine.signal.aborted) return;
      connection("lost", "The server does not answer: trying again…");
    }
    await new Promise((resume) => setTimeout(resume, pause));
  }
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) { watching.abort(); connection("lost", "Paused"); } else watch();
});
apiKey.addEventListener("change", watch);
watch();
