"use strict";
const episode = JSON.parse(document.getElementById("episode").textContent);
const { experts, decisions, stays } = episode;
const times = decisions.time;
const duration = times.at(-1) || 1;
const { WAITING, PREFILL, DECODE, CLOUD } = episode.phases;
const { IN_TIME, LATE, REJECTED, LOST, GIVEN_BACK, IN_FLIGHT, DECLINED } = episode.endings;
/** Where requests are that no expert got. */
const AWAY = experts.length;
const words = (codes) => Object.fromEntries(
  Object.entries(codes).map(([name, code]) => [code, name.toLowerCase().replace("_", " ")]));
const PHASES = words(episode.phases);
const OUTCOMES = words(episode.endings);
const MARKS = { [IN_TIME]: "●", [LATE]: "▲", [REJECTED]: "✕", [LOST]: "◆", [GIVEN_BACK]: "◁", [IN_FLIGHT]: "",
  [DECLINED]: "○" };
const OUTCOME_COLOURS = { [IN_TIME]: "--in-time", [LATE]: "--late", [REJECTED]: "--late", [LOST]: "--lost",
  [GIVEN_BACK]: "--soft", [IN_FLIGHT]: "--soft", [DECLINED]: "--declined" };

const element = (id) => document.getElementById(id);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const percent = (share) => `${Math.round(100 * share)} %`;
const endOf = (stay) => stay.end ?? Infinity;

function make(tag, className, parent, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  parent.append(made);
  return made;
}

// --- From samples to lives -----------------------------------------------------------------------------

/** What a stay does from when to when, as far as it is shown. A sample tells of the time before it. */
function phasesOf(stay) {
  const phases = [];
  const firstToken = stay.ttft === null ? -Infinity : stay.arrival + stay.ttft;
  let from = Math.max(stay.routed, 0);
  const push = (to, phase) => {
    if (phases.at(-1)?.phase === phase) phases.at(-1).to = to;
    else phases.push({ from, to, phase });
    from = to;
  };
  const add = (to, phase) => {
    if (to <= from) return;
    if (phase === DECODE && firstToken > from) push(Math.min(firstToken, to), PREFILL);
    if (to > from) push(to, phase);
  };
  if (stay.expert === AWAY) {
    add(Math.min(endOf(stay), duration), CLOUD);
    return phases;
  }
  stay.samples.phase.forEach((phase, i) => add(times[stay.sampled_from + i], phase));
  const completed = stay.outcome === IN_TIME || stay.outcome === LATE;
  add(Math.min(endOf(stay), duration), completed ? DECODE : stay.samples.phase.at(-1) ?? WAITING);
  return phases;
}

/** Give every time in the batch a seat. Who finds none is drawn waiting until the next one is free. */
function takeSeats(expert, mine) {
  const spans = [];
  for (const stay of mine) {
    let open = null;
    for (const part of stay.phases) {
      if (part.phase === WAITING) open = null;
      else if (open) open.parts.push(part);
      else spans.push((open = { stay, from: part.from, parts: [part] }));
    }
  }
  spans.sort((one, other) => one.from - other.from);
  const free = new Array(experts[expert].max_num_seqs).fill(-1);
  for (const { stay, parts } of spans) {
    let seat = free.findIndex((time) => time <= parts[0].from);
    if (seat < 0) {
      seat = free.indexOf(Math.min(...free));
      const from = Math.min(free[seat], parts[0].to);
      stay.phases.splice(stay.phases.indexOf(parts[0]), 0, { from: parts[0].from, to: from, phase: WAITING });
      parts[0].from = from;
    }
    for (const part of parts) part.seat = seat;
    free[seat] = parts.at(-1).to;
  }
}

/** Give every stay a lane of its expert's, as low as possible. Returns the number of lanes. */
function takeLanes(mine) {
  const free = [];
  for (const stay of mine) {
    const from = Math.max(stay.routed, 0);
    let lane = free.findIndex((time) => time < from);
    if (lane < 0) lane = free.push(0) - 1;
    stay.lane = lane;
    // A little air for the mark at the end.
    free[lane] = Math.max(Math.min(endOf(stay), duration), from) + duration * 0.008;
  }
  return Math.max(free.length, 1);
}

/** Linear interpolation between samples, with nothing at the start and everything at the end. */
function progress(stay, now) {
  const samples = stay.samples;
  const next = stay.sampled_from === null ? 0 : times.findIndex((time) => time > now) - stay.sampled_from;
  const last = samples.phase.length - 1;
  const point = (i) => {
    if (i < 0) return [stay.routed, 0, 0];
    if (i <= last) return [times[stay.sampled_from + i], samples.generated[i], samples.computed[i]];
    if (stay.ttft === null) return point(last);
    return [stay.end, stay.output_tokens, stay.prompt_tokens + stay.output_tokens - 1];
  };
  const i = next < 0 ? last + 1 : Math.min(next, last + 1);
  const [before, after] = [point(i - 1), point(i)];
  const share = after[0] > before[0] ? Math.min((now - before[0]) / (after[0] - before[0]), 1) : 1;
  const between = (j) => before[j] + share * (after[j] - before[j]);
  return { generated: Math.floor(between(1)), computed: Math.floor(between(2)) };
}

/** The greatest part of a limit that is used up: the tightest one counts. */
function timeUsed(stay, now) {
  const { limits, output_tokens: tokens } = stay;
  const elapsed = Math.min(now, endOf(stay)) - stay.arrival;
  const used = [0];
  if (limits.normalised) used.push(elapsed / (limits.normalised * tokens));
  if (limits.e2e) used.push(elapsed / limits.e2e);
  if (stay.ttft !== null) {
    const first = Math.min(elapsed, stay.ttft);
    if (limits.ttft) used.push(first / limits.ttft);
    if (limits.tpot && tokens > 1) used.push((elapsed - first) / (limits.tpot * (tokens - 1)));
  }
  return Math.max(...used);
}

const LIMITS = [
  ["ttft", (limit) => `TTFT ${limit.toFixed(2)} s`],
  ["tpot", (limit) => `TPOT ${(1000 * limit).toFixed(0)} ms`],
  ["e2e", (limit) => `E2E ${limit.toFixed(2)} s`],
  ["normalised", (limit) => `${(1000 * limit).toFixed(0)} ms per token of its answer`],
];
const limitsInWords = (limitOf) => LIMITS
  .filter(([name]) => typeof limitOf(name) === "number")
  .map(([name, words]) => words(limitOf(name)))
  .join(", ");

const byExpert = experts.map((_, expert) => stays.filter((stay) => stay.expert === expert));
for (const stay of stays) stay.phases = phasesOf(stay);
byExpert.forEach((mine, expert) => takeSeats(expert, mine));
const away = stays.filter((stay) => stay.expert === AWAY);
const lanes = [...byExpert, ...(away.length ? [away] : [])].map(takeLanes);
const preemptions = byExpert.map((mine) =>
  mine.flatMap((stay) =>
    stay.samples.preemptions
      .map((count, i) => ({ stay, more: i ? count > stay.samples.preemptions[i - 1] : count && stay.routed >= 0, i }))
      .filter(({ more }) => more)
      .map(({ i }) => ({ stay, time: times[stay.sampled_from + i] })),
  ),
);

// --- Colours -------------------------------------------------------------------------------------------

const RAMP = [[0, 63, 134, 198], [0.55, 232, 190, 50], [1, 213, 80, 0]];

function timeColour(used) {
  if (used > 1) return "#a3123a";
  const above = Math.max(RAMP.findIndex(([at]) => at >= used), 1);
  const [from, to] = [RAMP[above - 1], RAMP[above]];
  const share = Math.max((used - from[0]) / (to[0] - from[0]), 0);
  return `rgb(${[1, 2, 3].map((i) => Math.round(from[i] + share * (to[i] - from[i]))).join(" ")})`;
}

const stops = [0, 0.275, 0.55, 0.775, 1].map((used) => `${timeColour(used)} ${54 * used}%`);
document.querySelector(".ramp i").style.background = `linear-gradient(90deg, ${stops}, #a3123a 54%)`;

// --- Experts -------------------------------------------------------------------------------------------

/** Up to so many seats are all drawn, and large enough to show how far each answer is. */
const FEW_SEATS = 32;

/** The seats that are drawn: all, or, of many, those that anybody takes in this episode, in full rows of 32. */
function seatsDrawn(expert) {
  const all = experts[expert].max_num_seqs;
  if (all <= FEW_SEATS) return all;
  const taken = byExpert[expert].flatMap(({ phases }) => phases.map(({ seat }) => (seat ?? -1) + 1));
  const most = taken.reduce((one, other) => Math.max(one, other), 1);
  return Math.min(Math.ceil(most / 32) * 32, all);
}

const cards = experts.map(({ label, max_num_seqs }, expert) => {
  const card = make("article", "expert", element("experts"));
  const title = make("h3", "", card);
  make("span", "number", title, `${expert + 1}`);
  title.append(label);
  title.title = label;
  card.classList.toggle("many", max_num_seqs > FEW_SEATS);
  const batch = make("div", "cells", card);
  const seats = Array.from({ length: seatsDrawn(expert) }, () => make("div", "cell", batch));
  for (const seat of seats) make("i", "", seat);
  const queue = make("div", "cells", card);
  const said = make("div", "said", card);
  return { card, seats, queue, load: make("span", "", said), memory: make("span", "", said), kv: make("canvas", "", card) };
});

function showExpert(expert, now, decision) {
  const { card, seats, queue, load, memory } = cards[expert];
  const { max_num_seqs, kv_capacity } = experts[expert];
  const up = decisions.up[decision][expert];
  card.classList.toggle("chosen", decisions.expert[decision] === expert);
  card.classList.toggle("down", !up);
  const seated = new Map();
  const waiting = [];
  for (const stay of byExpert[expert]) {
    if (stay.routed > now || endOf(stay) <= now) continue;
    const part = stay.phases.find(({ from, to }) => from <= now && now < to) ?? stay.phases.at(-1);
    if (!part || part.to < now) continue;
    if (part.phase === WAITING) waiting.push(stay);
    else seated.set(part.seat, { stay, part });
  }
  seats.forEach((cell, seat) => {
    const here = seated.get(seat);
    cell.className = "cell" + (here ? " taken" : "") + (here?.part.phase === PREFILL ? " prefill" : "");
    cell.stay = here?.stay;
    if (here) cell.style.setProperty("--time", timeColour(timeUsed(here.stay, now)));
    cell.firstChild.style.height = here
      ? percent(progress(here.stay, now).generated / here.stay.output_tokens).replace(" ", "")
      : "0";
  });
  queue.replaceChildren();
  for (const stay of waiting) {
    const seen = stay.sampled_from === null ? -1 : decision - stay.sampled_from;
    const cell = make("div", "cell wait", queue, stay.samples.preemptions[seen] ? "↺" : "");
    cell.style.setProperty("--time", timeColour(timeUsed(stay, now)));
    cell.stay = stay;
  }
  if (!waiting.length) make("span", "note", queue, up ? "nobody waits" : "down");
  load.textContent = `${seated.size} of ${max_num_seqs} running · ${waiting.length} waiting`;
  const held = kvAt(expert, now, decision);
  memory.textContent = `KV cache ${percent(held / kv_capacity)} of ${kv_capacity.toLocaleString("en")} tokens`;
  drawKv(expert, now);
}

function kvAt(expert, now, decision) {
  const next = Math.min(decision + 1, times.length - 1);
  const step = times[next] - times[decision];
  const share = step > 0 ? (now - times[decision]) / step : 0;
  return decisions.kv[decision][expert] * (1 - share) + decisions.kv[next][expert] * share;
}

/** A canvas as large as it is shown, in sharp pixels, and cleared. */
function brush(canvas, height) {
  const ratio = window.devicePixelRatio || 1;
  const width = canvas.clientWidth;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width };
}

function drawKv(expert, now) {
  const height = 40, top = 8;
  const { context, width } = brush(cards[expert].kv, height);
  const x = (time) => (width * time) / duration;
  const y = (tokens) => height - ((height - top) * tokens) / experts[expert].kv_capacity;
  context.strokeStyle = colours["--line"];
  context.setLineDash([3, 3]);
  context.strokeRect(-1, top, width + 2, height);
  context.setLineDash([]);
  const area = new Path2D();
  area.moveTo(0, height);
  times.forEach((time, k) => area.lineTo(x(time), y(decisions.kv[k][expert])));
  area.lineTo(width, height);
  context.fillStyle = colours["--kv"];
  twice(context, x(now), height, (alpha) => {
    context.globalAlpha = alpha * 0.8;
    context.fill(area);
  });
  context.fillStyle = colours["--late"];
  for (const { time } of preemptions[expert]) {
    context.globalAlpha = time <= now ? 1 : 0.3;
    context.beginPath();
    context.moveTo(x(time) - 3.5, 0);
    context.lineTo(x(time) + 3.5, 0);
    context.lineTo(x(time), 7);
    context.fill();
  }
  context.globalAlpha = 1;
  context.fillStyle = colours["--accent"];
  context.fillRect(Math.min(x(now), width - 1.5), 0, 1.5, height);
}

/** Draw all of it faintly, and once more what lies before now. */
function twice(context, now, height, draw, left = 0) {
  draw(0.25);
  context.save();
  context.beginPath();
  context.rect(left - 9, 0, now - left + 9, height);
  context.clip();
  draw(1);
  context.restore();
  context.globalAlpha = 1;
}

// --- Router --------------------------------------------------------------------------------------------

const learned = decisions.probability[0].some((probability) => probability !== null);
const COLUMNS = [
  ["Quality", "predicted", (k, i) => decisions.quality[k][i].toFixed(2)],
  ["Answer", "tokens", (k, i) => decisions.output_tokens[k][i].toFixed(0)],
  ...(decisions.cached_tokens
    ? [["Cached", "of the prompt", (k, i) => percent(decisions.cached_tokens[k][i] / decisions.prompt_tokens[k])]]
    : []),
  ["TTFT", "s", (k, i) => decisions.ttft[k][i].toFixed(2)],
  ["Latency", "ms/token", (k, i) => (1000 * decisions.latency[k][i]).toFixed(0)],
  ["In time", "probability", (k, i) => percent(decisions.in_time[k][i])],
  ["Own QoS", "expected", (k, i) => decisions.qos[k][i].toFixed(3)],
  ["QoS lost", "by others", (k, i) => decisions.qos_loss[k][i].toFixed(3)],
  ["Gain", "own − lost", (k, i) => (decisions.qos[k][i] - decisions.qos_loss[k][i]).toFixed(3)],
];

let shownDecision = -1;

const nameOf = (place) => place < AWAY ? `expert ${place + 1}` : "away";
const fateOf = (k) => decisions.expert[k] < AWAY ? nameOf(decisions.expert[k])
  : decisions.away_to_cloud[k] ? "the cloud" : "declined";

function showRouter(k) {
  if (k === shownDecision) return;
  shownDecision = k;
  const chosen = decisions.expert[k];
  element("arrival").textContent =
    `Request ${decisions.number[k]} at ${times[k].toFixed(2)} s: ${decisions.prompt_tokens[k]} prompt tokens, ` +
    `at most ${limitsInWords((name) => decisions[`${name}_limit`]?.[k])} → ${fateOf(k)}`;
  const table = element("router");
  table.replaceChildren();
  const head = make("tr", "", table);
  const heading = (title, unit) => make("small", "", make("th", "", head, title), unit);
  heading("Expert", "");
  heading(learned ? "Probability" : "Choice", "of the policy");
  for (const [title, unit] of COLUMNS) heading(title, unit);
  experts.forEach(({ label }, i) => {
    const up = decisions.up[k][i];
    const row = make("tr", i === chosen ? "chosen" : decisions.available[k][i] ? "" : "down", table);
    const name = make("td", "", row);
    make("span", "number", name, `${i + 1}`);
    name.append(label.split(" / ")[0]);
    const choice = make("td", "bar", row);
    if (i !== chosen && !decisions.available[k][i]) choice.append(up ? "no room" : "down");
    else if (learned) {
      make("i", "", choice).style.width = `${(3 * decisions.probability[k][i]).toFixed(2)}rem`;
      choice.append(percent(decisions.probability[k][i]));
    } else if (i === chosen) choice.append("chosen");
    for (const [, , text] of COLUMNS) make("td", "", row, text(k, i));
  });
  if (decisions.away_to_cloud) showAway(k, table, chosen === AWAY);
}

/** The last row: what the request is worth elsewhere. Declined, it is worth nothing, and takes nothing from others. */
function showAway(k, table, chosen) {
  const row = make("tr", chosen ? "chosen" : "", table);
  const toCloud = decisions.away_to_cloud[k];
  make("span", "number", make("td", "", row), "○").after(toCloud ? "Away: the cloud" : "Away: declined");
  const choice = make("td", "bar", row);
  if (learned) {
    make("i", "", choice).style.width = `${(3 * (decisions.probability[k][AWAY] ?? 0)).toFixed(2)}rem`;
    choice.append(percent(decisions.probability[k][AWAY] ?? 0));
  } else if (chosen) choice.append("chosen");
  const [qos, cost] = [decisions.away_qos[k], decisions.away_cost[k]];
  const texts = {
    Quality: decisions.away_predicted_quality[k].toFixed(2),
    "In time": percent(decisions.away_in_time[k]),
    "Own QoS": qos.toFixed(3),
    Gain: cost ? `${(qos - cost).toFixed(3)} (cost ${cost.toFixed(3)})` : (qos - cost).toFixed(3),
  };
  for (const [title] of COLUMNS) make("td", "", row, title === "Gain" || toCloud ? texts[title] ?? "" : "");
}

// --- Lives ---------------------------------------------------------------------------------------------

const GUTTER = 184, AXIS = 24, PAD = 5;
const totalLanes = lanes.reduce((sum, count) => sum + count, 0);
const laneHeight = Math.min(Math.max(Math.floor(620 / totalLanes), 5), 11);
const sectionHeights = lanes.map((count) => Math.max(count * laneHeight, 16) + 2 * PAD);
const sectionTops = sectionHeights.map((_, i) => AXIS + sectionHeights.slice(0, i).reduce((sum, h) => sum + h, 0));
const livesHeight = AXIS + sectionHeights.reduce((sum, height) => sum + height, 0);
element("lives").style.height = `${livesHeight}px`;
const livesWidth = () => element("lives").clientWidth - GUTTER - 14;
const livesX = (time) => GUTTER + (livesWidth() * time) / duration;
const laneTop = (stay) => sectionTops[stay.expert] + PAD + stay.lane * laneHeight;

function drawLives(now) {
  const { context, width } = brush(element("lives"), livesHeight);
  context.textBaseline = "middle";
  context.font = "11px system-ui, 'DejaVu Sans', sans-serif";
  context.lineWidth = 1;
  const step = [0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500].find((tick) => duration / tick <= 24) ?? 1000;
  context.textAlign = "center";
  for (let time = 0; time <= duration; time += step) {
    context.fillStyle = colours["--line"];
    context.fillRect(livesX(time), AXIS - 4, 1, livesHeight);
    context.fillStyle = colours["--soft"];
    context.fillText(time ? `${time}` : "0 s", livesX(time), AXIS / 2 - 1);
  }
  context.textAlign = "left";
  lanes.forEach((_, i) => {
    context.fillStyle = colours["--line"];
    context.fillRect(0, sectionTops[i], width, 1);
    context.fillStyle = colours["--ink"];
    context.fillText(i < AWAY ? `${i + 1}  ${experts[i].label.split(" / ")[0]}` : "○  sent away", 10, sectionTops[i] + PAD + 9, GUTTER - 20);
  });
  const bar = laneHeight - (laneHeight > 6 ? 2 : 1);
  twice(context, livesX(now), livesHeight, (alpha) => {
    context.globalAlpha = alpha;
    for (const stay of stays) {
      const middle = laneTop(stay) + laneHeight / 2;
      for (const { from, to, phase } of stay.phases) {
        context.fillStyle = colours[`--${PHASES[phase]}`];
        const thick = phase === WAITING ? Math.max(bar / 3, 2) : bar;
        context.fillRect(livesX(from), middle - thick / 2, Math.max(livesX(to) - livesX(from), 0.5), thick);
      }
    }
    for (const { time, stay } of preemptions.flat()) {
      context.fillStyle = colours["--ink"];
      context.fillRect(livesX(time) - 1, laneTop(stay), 2, laneHeight);
    }
    context.textAlign = "center";
    context.font = `${Math.max(laneHeight, 9)}px system-ui, 'DejaVu Sans', sans-serif`;
    for (const stay of stays) {
      if (endOf(stay) > duration) continue;
      context.fillStyle = colours[OUTCOME_COLOURS[stay.outcome]];
      context.fillText(MARKS[stay.outcome], livesX(stay.end), laneTop(stay) + laneHeight / 2 + 0.5);
    }
  }, GUTTER);
  context.fillStyle = colours["--accent"];
  context.fillRect(livesX(now) - 0.75, 0, 1.5, livesHeight);
}

const key = element("key");
const toCloud = away.filter((stay) => stay.outcome !== DECLINED);
for (const [code, phase] of Object.entries(PHASES)) {
  if (Number(code) === CLOUD && !toCloud.length) continue;
  const entry = make("span", "", key);
  make("i", "", entry).style.background = `var(--${phase})`;
  entry.append(phase);
}
const there = new Set(stays.map((stay) => stay.outcome));
for (const outcome of [IN_TIME, LATE, REJECTED, DECLINED, LOST, GIVEN_BACK]) {
  if ([DECLINED, LOST, GIVEN_BACK].includes(outcome) && !there.has(outcome)) continue;
  const entry = make("span", "", key);
  make("b", "", entry, MARKS[outcome]).style.color = `var(${OUTCOME_COLOURS[outcome]})`;
  entry.append(OUTCOMES[outcome]);
}
make("span", "", make("span", "", key), "❘ preempted (its prefill starts again)");
make("span", "", key, "faint: still to come · click to go there");

// --- Tiles ---------------------------------------------------------------------------------------------

const tile = (name) => {
  const entry = make("div", "", element("tiles"));
  make("dt", "", entry, name);
  return make("dd", "", entry);
};
const tiles = {
  arrived: tile("arrived"),
  inFlight: tile("in flight"),
  [IN_TIME]: tile("in time"),
  [LATE]: tile("late"),
  [REJECTED]: tile("rejected"),
  ...(there.has(DECLINED) && { [DECLINED]: tile("declined") }),
  ...(toCloud.length && { toCloud: tile("sent to the cloud") }),
  ...(there.has(LOST) && { [LOST]: tile("lost") }),
  ...(there.has(GIVEN_BACK) && { [GIVEN_BACK]: tile("given back and routed again") }),
  qos: tile("average QoS of those that have ended"),
};

function showTiles(now, decision) {
  const counts = Object.fromEntries(Object.values(episode.endings).map((outcome) => [outcome, 0]));
  let qos = 0, inFlight = 0;
  for (const stay of stays) {
    if (endOf(stay) <= now) {
      counts[stay.outcome] += 1;
      if (stay.outcome === IN_TIME) qos += stay.quality;
    } else if (stay.routed <= now) inFlight += 1;
  }
  const ended = counts[IN_TIME] + counts[LATE] + counts[REJECTED] + counts[LOST] + counts[DECLINED];
  tiles.arrived.textContent = new Set(decisions.number.slice(0, decision + 1)).size;
  tiles.inFlight.textContent = inFlight;
  if (tiles.toCloud) tiles.toCloud.textContent = toCloud.filter((stay) => stay.routed <= now).length;
  for (const [outcome, count] of Object.entries(counts)) if (tiles[outcome]) tiles[outcome].textContent = count;
  tiles.qos.textContent = ended ? (qos / ended).toFixed(3) : "–";
}

// --- Time ----------------------------------------------------------------------------------------------

let now = 0, playing = false, before = 0, colours = {};

function show() {
  let decision = times.length - 1;
  while (decision > 0 && times[decision] > now) decision -= 1;
  element("scrub").value = now;
  element("clock").textContent = `${now.toFixed(2)} of ${duration.toFixed(2)} s`;
  showTiles(now, decision);
  experts.forEach((_, expert) => showExpert(expert, now, decision));
  showRouter(decision);
  drawLives(now);
}

function go(time) {
  now = Math.min(Math.max(time, 0), duration);
  show();
}

function play(on) {
  if (on && now >= duration) now = 0;
  playing = on;
  element("play").textContent = on ? "Pause" : "Play";
  before = performance.now();
  if (on) requestAnimationFrame(frame);
}

function frame(at) {
  if (!playing) return;
  go(now + ((at - before) / 1000) * Number(element("speed").value));
  before = at;
  if (now >= duration) play(false);
  else requestAnimationFrame(frame);
}

function stepBy(count) {
  play(false);
  let time = now;
  for (let i = 0; i < Math.abs(count); i += 1) {
    const next = count > 0 ? times.find((other) => other > time) : times.findLast((other) => other < time);
    time = next ?? time;
  }
  go(time);
}

element("scrub").max = duration;
element("scrub").addEventListener("input", (event) => go(Number(event.target.value)));
element("play").addEventListener("click", () => play(!playing));
element("back").addEventListener("click", () => stepBy(-1));
element("forward").addEventListener("click", () => stepBy(1));
document.addEventListener("keydown", (event) => {
  if (event.target.tagName === "SELECT" || event.ctrlKey || event.altKey || event.metaKey) return;
  const actions = {
    " ": () => play(!playing),
    ArrowLeft: () => stepBy(event.shiftKey ? -10 : -1),
    ArrowRight: () => stepBy(event.shiftKey ? 10 : 1),
    Home: () => go(0),
    End: () => go(duration),
  };
  if (!(event.key in actions)) return;
  event.preventDefault();
  actions[event.key]();
});

// --- What the pointer is on ----------------------------------------------------------------------------

function describe(stay) {
  const part = stay.phases.findLast(({ from }) => from <= now);
  const { generated, computed } = progress(stay, now);
  if (stay.outcome === DECLINED) {
    return `Request ${stay.number}, ${stay.prompt_tokens} prompt tokens\ndeclined at ${stay.end.toFixed(2)} s`;
  }
  const where = stay.expert < AWAY ? `at expert ${stay.expert + 1}, ${experts[stay.expert].label}` : "in the cloud";
  const lines = [`Request ${stay.number} ${where}`];
  lines.push(`prompt ${stay.prompt_tokens} tokens, answer ${stay.output_tokens} tokens, quality ${stay.quality.toFixed(2)}`);
  if (stay.expert < AWAY && stay.routed <= now && now < endOf(stay) && part) {
    lines.push(`${PHASES[part.phase]}: ${generated} tokens generated, ${computed} in the KV cache`);
  }
  if (now >= stay.arrival) {
    lines.push(`at most ${limitsInWords((name) => stay.limits[name])}: ${percent(timeUsed(stay, now))} used`);
  }
  if (stay.preemptions) lines.push(`preempted ${stay.preemptions === 1 ? "once" : `${stay.preemptions} times`}`);
  if (stay.ttft !== null) {
    const latency = stay.end - stay.arrival;
    lines.push(`${OUTCOMES[stay.outcome]} at ${stay.end.toFixed(2)} s: TTFT ${stay.ttft.toFixed(2)} s, ` +
      `E2E ${latency.toFixed(2)} s, ${((1000 * latency) / stay.output_tokens).toFixed(0)} ms per token`);
  } else if (stay.end !== null) lines.push(`${OUTCOMES[stay.outcome]} at ${stay.end.toFixed(2)} s`);
  return lines.join("\n");
}

function stayAt(event) {
  if (event.target.id !== "lives") return event.target.closest?.(".cell")?.stay;
  const box = event.target.getBoundingClientRect();
  const [x, y] = [event.clientX - box.left, event.clientY - box.top];
  return stays.find((stay) => {
    const to = livesX(Math.min(endOf(stay), duration)) + 4;
    return y >= laneTop(stay) && y < laneTop(stay) + laneHeight && x >= livesX(Math.max(stay.routed, 0)) - 4 && x <= to;
  });
}

document.addEventListener("pointermove", (event) => {
  const stay = stayAt(event);
  const tip = element("tip");
  tip.hidden = !stay;
  if (!stay) return;
  tip.textContent = describe(stay);
  tip.style.left = `${Math.max(Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 8), 8)}px`;
  const below = event.clientY + 16;
  const fits = below + tip.offsetHeight < window.innerHeight;
  tip.style.top = `${fits ? below : event.clientY - tip.offsetHeight - 10}px`;
});

element("lives").addEventListener("pointerdown", (event) => {
  const x = event.clientX - event.target.getBoundingClientRect().left;
  if (x > GUTTER) go(((x - GUTTER) / livesWidth()) * duration);
});

// --- Start ---------------------------------------------------------------------------------------------

function dress() {
  const names = ["--ink", "--soft", "--line", "--accent", "--waiting", "--prefill", "--decode", "--kv", "--in-time",
    "--late", "--lost", "--declined", "--cloud"];
  colours = Object.fromEntries(names.map((name) => [name, colour(name)]));
  show();
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", dress);
window.addEventListener("resize", show);
// A link to view.html#12.5 opens at 12.5 s.
now = Math.min(Math.max(Number(location.hash.slice(1)) || 0, 0), duration);
dress();
