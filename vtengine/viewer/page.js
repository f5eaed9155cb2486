"use strict";
// Rows are untrusted: everything is shown through text nodes, never parsed as HTML.
(() => {
  const PAGE = 24;
  const rows = [];
  for (const element of document.querySelectorAll("script.rows")) {
    for (const row of JSON.parse(element.textContent)) rows.push(row);
    element.remove();
  }
  const $ = (id) => document.getElementById(id);
  const list = $("list"), more = $("more"), count = $("count");
  const inputs = { q: $("search"), status: $("status"), views: $("views"), verdict: $("verdict"), order: $("order") };

  const node = (tag, className, ...children) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    for (const child of children) if (child !== null && child !== undefined && child !== "") element.append(child);
    return element;
  };
  const text = (value) => (typeof value === "string" ? value : value === null || value === undefined ? "" : JSON.stringify(value));
  const items = (value) => (Array.isArray(value) ? value : []);
  const whole = (value) => (Number.isFinite(value) && value > 0 ? Math.round(value) : 0);
  const number = (value) => whole(value).toLocaleString("en");
  const signed = (value) => (value >= 0 ? "+" : "") + value.toFixed(3);
  const seconds = (value) => (!Number.isFinite(value) ? "" : value < 1 ? Math.round(value * 1000) + " ms" : value.toFixed(2) + " s");
  const plural = (value, word) => number(value) + " " + word + (whole(value) === 1 ? "" : "s");

  // Splits a reply into its marked parts; a part without its end runs to the end of the reply.
  const KINDS = { think: "think", answer: "answer", tool_call: "action" };
  function segments(reply) {
    const parts = [];
    let rest = reply;
    while (rest) {
      const open = /<(think|answer|tool_call)>/.exec(rest);
      const before = open ? rest.slice(0, open.index) : rest;
      if (before.trim()) parts.push(["plain", "", before.trim()]);
      if (!open) break;
      const name = open[1], from = open.index + open[0].length, to = rest.indexOf("</" + name + ">", from);
      parts.push([KINDS[name], name, (to < 0 ? rest.slice(from) : rest.slice(from, to)).trim()]);
      rest = to < 0 ? "" : rest.slice(to + name.length + 3);
    }
    return parts;
  }

  function bar(turn, longest) {
    const sizes = [["cached", whole(turn.cached_tokens)], ["prefill", whole(turn.prefill_tokens)], ["written", whole(turn.completion_tokens)]];
    const ns = "http://www.w3.org/2000/svg";
    const svg = document.createElementNS(ns, "svg");
    svg.setAttribute("viewBox", "0 0 " + Math.max(1, longest) + " 1");
    svg.setAttribute("preserveAspectRatio", "none");
    let x = 0;
    for (const [name, size] of sizes) {
      const rect = document.createElementNS(ns, "rect");
      rect.setAttribute("class", name);
      rect.setAttribute("x", x);
      rect.setAttribute("width", size);
      rect.setAttribute("height", 1);
      svg.append(rect);
      x += size;
    }
    const holder = node("div", "bar", svg);
    holder.title = sizes.map(([name, size]) => name + " " + size).join(", ") + " tokens";
    return holder;
  }

  function advantage(of) {
    return Number.isFinite(of.advantage) ? node("span", "chip " + (of.advantage < 0 ? "bad" : "good"), "advantage " + signed(of.advantage)) : null;
  }

  function turnNode(turn, index, longest) {
    if (!turn || typeof turn !== "object") return null;
    const images = items(turn.images).filter((image) => image && typeof image === "object");
    const seen = images.map((image) => whole(image.width) + "×" + whole(image.height) + (image.encoded ? "" : " (already encoded)"));
    const head = node("div", "turn-head", node("b", "", "Turn " + (index + 1)),
      node("span", "", plural(turn.prompt_tokens, "prompt token") + ": " + number(turn.cached_tokens) + " from cache, " + number(turn.prefill_tokens) + " prefilled"),
      node("span", "", number(turn.completion_tokens) + " written"),
      seen.length ? node("span", "", "image " + seen.join(", ")) : null,
      turn.finish && turn.finish !== "stop" ? node("span", "chip warn", text(turn.finish)) : null,
      turn.action ? node("span", "chip warn", "→ " + text(turn.action)) : null,
      advantage(turn),
      node("span", "", seconds(turn.latency_s)));
    const body = segments(text(turn.text)).map(([kind, name, content]) =>
      node("div", "segment " + kind, name ? node("span", "tag", name) : null, content));
    return node("section", "turn", head, bar(turn, longest), ...body);
  }

  function figureNode(view) {
    const caption = node("figcaption", "", node("b", "", view.name + " view"), view.shown ? "" : " · not shown",
      node("div", "", view.width + "×" + view.height + " · " + plural(view.visual_tokens, "token")));
    const source = view.key && document.getElementById(view.key);
    if (!source) return node("figure", "", node("div", "none", view.note || "no picture"), caption);
    const image = node("img");
    image.src = source.textContent;
    image.loading = "lazy";
    image.alt = view.name + " view";
    image.addEventListener("click", () => zoom(image.src, caption.textContent));
    return node("figure", view.shown ? "" : "unseen", image, caption);
  }

  const isUnfinished = (row) => row.status === "rejected" || row.status === "failed";

  function verdictOf(row) {
    if (isUnfinished(row)) return "none";
    return row.correct === true ? "right" : row.correct === false ? "wrong" : "none";
  }

  const MARKS = { right: "good", wrong: "bad", none: "" };

  function topNode(row) {
    const bad = isUnfinished(row), mark = verdictOf(row);
    const full = whole(row.visual_tokens_full), spent = whole(row.visual_tokens);
    const figures = [];
    if (full) figures.push(number(spent) + " of " + number(full) + " visual tokens (" + Math.round((100 * spent) / full) + " %)");
    if (Number.isFinite(row.latency_s) && items(row.turns).length) figures.push(seconds(row.latency_s));
    return node("div", "top", node("span", "number", "#" + row._number), node("span", "id", text(row.id)),
      row.sample ? node("span", "chip", "sample " + text(row.sample)) : null,
      node("span", "chip " + (bad ? "bad" : row.status === "answered" ? "good" : "warn"), text(row.status)),
      mark === "none" ? null : node("span", "chip " + MARKS[mark], mark),
      row.upscaled === true ? node("span", "chip warn", "asked for more pixels") : null,
      Number.isFinite(row.reward) ? node("span", "chip", "reward " + row.reward.toFixed(3)) : null,
      advantage(row),
      node("span", "figures", figures.join(" · ")));
  }

  const SHOWN = new Set(["id", "sample", "status", "error", "answer", "expected", "correct", "upscaled", "turns", "visual_tokens",
    "visual_tokens_full", "latency_s", "question", "reward", "advantage", "_number", "_views"]);

  function card(row) {
    const turns = items(row.turns);
    const longest = Math.max(1, ...turns.map((turn) => (turn ? whole(turn.prompt_tokens) + whole(turn.completion_tokens) : 0)));
    const facts = node("dl", "verdict");
    const fact = (name, value, className) => facts.append(node("div", "", node("dt", "", name), node("dd", className, value)));
    if (turns.length) fact("Answer", row.answer === null || row.answer === undefined ? "none" : text(row.answer), MARKS[verdictOf(row)]);
    if (row.expected !== undefined && row.expected !== null) fact("Expected", items(row.expected).length ? row.expected.map(text).join(" or ") : text(row.expected), "");
    const error = row.error && typeof row.error === "object" ? node("div", "error", node("code", "", text(row.error.code)), text(row.error.message)) : null;
    const extra = Object.entries(row).filter(([key]) => !SHOWN.has(key));
    const details = node("details", "", node("summary", "", "other fields"));
    details.addEventListener("toggle", () => {
      if (details.open && !details.querySelector("pre")) details.append(node("pre", "", JSON.stringify(Object.fromEntries(extra), null, 1)));
    });
    const views = items(row._views).map(figureNode);
    const classes = [isUnfinished(row) ? "bad" : "", { right: "right", wrong: "wrong", none: "" }[verdictOf(row)], views.length ? "" : "bare"];
    return node("article", classes.filter(Boolean).join(" "), topNode(row), views.length ? node("div", "views", ...views) : null,
      node("div", "story", node("p", "question", text(row.question)), facts.childElementCount ? facts : null, error,
        ...turns.map((turn, index) => turnNode(turn, index, longest)), extra.length ? details : null));
  }

  function haystack(row) {
    if (row._text === undefined) {
      const parts = [text(row.id), text(row.question), text(row.answer), text(row.expected), row.error ? text(row.error) : ""];
      for (const turn of items(row.turns)) if (turn) parts.push(text(turn.text));
      Object.defineProperty(row, "_text", { value: parts.join("\n").toLowerCase() });
    }
    return row._text;
  }

  const ORDERS = {
    visual: (a, b) => whole(b.visual_tokens) - whole(a.visual_tokens),
    latency: (a, b) => (b.latency_s || 0) - (a.latency_s || 0),
    reward: (a, b) => (a.reward ?? Infinity) - (b.reward ?? Infinity) || 0,
  };
  let matching = [], shown = 0;

  function refresh() {
    const words = inputs.q.value.toLowerCase().split(/\s+/).filter(Boolean);
    const { status, views, verdict: wanted, order } = inputs;
    matching = rows.filter((row) => (!status.value || text(row.status) === status.value)
      && (!views.value || (row.upscaled === true) === (views.value === "yes"))
      && (!wanted.value || verdictOf(row) === wanted.value)
      && words.every((word) => haystack(row).includes(word)));
    if (ORDERS[order.value]) matching.sort(ORDERS[order.value]);
    shown = 0;
    list.replaceChildren();
    count.textContent = matching.length === rows.length ? plural(rows.length, "row") : number(matching.length) + " of " + plural(rows.length, "row");
    if (!matching.length) list.append(node("p", "empty", rows.length ? "No row matches these filters." : "This run has no rows."));
    showMore();
  }

  function showMore() {
    for (const row of matching.slice(shown, shown + PAGE)) list.append(card(row));
    shown = Math.min(matching.length, shown + PAGE);
    more.hidden = shown >= matching.length;
  }

  function zoom(source, caption) {
    const dialog = $("zoom");
    dialog.querySelector("img").src = source;
    dialog.querySelector("p").textContent = caption;
    dialog.showModal();
  }

  function remember() {
    const state = new URLSearchParams();
    for (const [name, input] of Object.entries(inputs)) if (input.value) state.set(name, input.value);
    history.replaceState(null, "", "#" + state);
  }

  for (const status of [...new Set(rows.map((row) => text(row.status)))].sort()) {
    const option = node("option", "", status);
    option.value = status;
    inputs.status.append(option);
  }
  for (const [name, value] of new URLSearchParams(location.hash.slice(1))) if (inputs[name]) inputs[name].value = value;
  for (const input of Object.values(inputs)) input.addEventListener("input", () => { remember(); refresh(); });
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("zoom").addEventListener("click", () => $("zoom").close());
  $("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });
  more.addEventListener("click", showMore);
  new IntersectionObserver((entries) => { if (entries.some((entry) => entry.isIntersecting)) showMore(); }, { rootMargin: "900px" }).observe($("end"));
  refresh();
})();
