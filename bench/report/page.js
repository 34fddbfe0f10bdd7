// The page's behaviour: one state, kept in the address after "#", drives every chart and every table.
"use strict";

(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const controls = document.getElementById("controls");
  const table = document.getElementById("points");
  const byId = Object.fromEntries(data.points.map((point) => [point.id, point]));
  const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");
  const reduceMotion = window.matchMedia("(prefers-reduced-motion: reduce)").matches;

  // State. What is hidden is listed, so that nothing is hidden by default and new mixers show up in old links.
  let state = readHash();

  function readHash() {
    const given = new URLSearchParams(location.hash.slice(1));
    const list = (key) => new Set(given.getAll(key));
    const [column, direction] = (given.get("sort") || "").split(".");
    return {
      axis: given.get("cost") in data.axes ? given.get("cost") : "state",
      progress: given.get("progress") === "examples" ? "examples" : "step",
      speed: ["prefill", "decode"].includes(given.get("speed")) ? given.get("speed") : "train",
      hiddenMixers: list("hide"),
      hiddenTasks: new Set(data.tasks.filter((task) => list("hidetask").has(task.title)).map((task) => task.id)),
      front: given.get("front") === "1",
      sort: direction === "ascending" || direction === "descending" ? { column, direction } : null,
      theme: ["dark", "light"].includes(given.get("theme")) ? given.get("theme") : null,
    };
  }

  function writeHash() {
    const out = new URLSearchParams();
    if (state.axis !== "state") out.set("cost", state.axis);
    if (state.progress !== "step") out.set("progress", state.progress);
    if (state.speed !== "train") out.set("speed", state.speed);
    for (const mixer of state.hiddenMixers) out.append("hide", mixer);
    for (const task of data.tasks) if (state.hiddenTasks.has(task.id)) out.append("hidetask", task.title);
    if (state.front) out.set("front", "1");
    if (state.sort) out.set("sort", `${state.sort.column}.${state.sort.direction}`);
    if (state.theme) out.set("theme", state.theme);
    history.replaceState(null, "", out.size ? `#${out}` : location.pathname + location.search);
  }

  const isDark = () => (state.theme ? state.theme === "dark" : prefersDark.matches);
  const isShown = (point) =>
    !state.hiddenMixers.has(point.mixer) && !state.hiddenTasks.has(point.task) && (!state.front || point[`front_${state.axis}`]);

  // Data of the charts: the rows that are shown, with the cost, colour and shape to draw.
  function drawn(point) {
    const mixer = data.mixers[point.mixer];
    const color = isDark() ? mixer.dark : mixer.light;
    return { ...point, x: point[data.axes[state.axis]], color, fill: point.n > 1 ? color : "transparent", shape: mixer.shape };
  }

  function paretoData(task, width) {
    const points = data.points.filter((p) => p.task === task.id && isShown(p) && p.accuracy !== null).map(drawn).filter((p) => p.x > 0);
    const { front, taken } = ChartText.ofFront(points.filter((p) => p[`front_${state.axis}`]).sort((a, b) => a.x - b.x), points, width);
    // A need far below every state would squeeze the points into a corner: it becomes a note at the left edge.
    const least = Math.min(...points.map((p) => p.x));
    const wide = width > 500;
    const need = task.bits / 8;
    const off = need < least / 8;
    const label = wide ? `needed for ${task.bits_cell}: ${ChartText.bytes(need)}` : `needed: ${ChartText.bytes(need)}`;
    const note = off ? ChartText.inCorner(`◂ ${label}${wide ? ", left of this plot" : ""}`, taken) : { label, top_label: "" };
    const bits = points.length && need > 0 ? [{ x: off ? least : need, off, ...note }] : [];
    return { points, front, bits, ceilings: ChartText.ofLines(task.lines, taken, -36, width - 144) };
  }

  function heatData(task) {
    const slices = [];
    for (const point of data.points.filter((p) => p.task === task.id && isShown(p))) {
      for (const slice of task.slices) {
        const beyond = task.beyond.includes(slice.split("/")[0]);
        const label = beyond ? `${slice} ↗` : slice;
        if (slice in point.slices) slices.push({ name: point.name, slice: label, range: beyond ? "beyond" : "inside", accuracy: point.slices[slice], n: point.n });
      }
    }
    return { slices };
  }

  // Scores by task: a mixer's row stays as long as the mixer is shown, whatever its place on the fronts.
  function familyData() {
    const scores = [];
    data.families.rows.forEach((row, rank) => data.families.columns.forEach((column, i) => {
      const score = row.scores[i];
      if (state.hiddenMixers.has(row.mixer) || state.hiddenTasks.has(column.task) || score === null) return;
      scores.push({ name: row.name, rank, score, number: Math.round(100 * score), mean: column.task === null, ...column });
    }));
    return { scores };
  }

  function curveData(task) {
    const curves = [];
    for (const curve of data.curves) {
      const point = byId[curve.point];
      if (point.task !== task.id || !isShown(point)) continue;
      const { name, color } = drawn(point);
      curve.step.forEach((step, i) => curves.push({
        name, color, step, examples: curve.examples[i], mean: curve.mean[i], low: curve.low[i], high: curve.high[i],
        variant: curve.variant, n: curve.n,
      }));
    }
    return { curves };
  }

  // A published figure: hollow marks are published, filled ones ours; grey is published only.
  function publishedData(panel) {
    const style = getComputedStyle(document.documentElement);
    const values = panel.values.filter((value) => !value.mixer || !state.hiddenMixers.has(value.mixer)).map((value) => {
      const mixer = data.mixers[value.mixer];
      const color = mixer ? (isDark() ? mixer.dark : mixer.light) : style.getPropertyValue("--muted").trim();
      return { ...value, color, shape: mixer?.shape ?? "circle" };
    });
    return { values };
  }

  // Accuracy against the speed that is chosen, for the points that have one.
  function recallData(task, width) {
    const points = data.speed.recall.filter((item) => item.mode === state.speed && byId[item.point].task === task.id).filter((item) => isShown(byId[item.point]) && byId[item.point].accuracy !== null)
      .map((item) => ({ ...drawn(byId[item.point]), ...item, speed_text: Math.round(item.tokens_per_second).toLocaleString("en") }));
    const across = ChartText.placed(points.map((p) => p.tokens_per_second));
    const marks = points.map((row, i) => ({ row, text: row.name, leftToo: true, x: across[i] * (width - 120), y: -350 * row.accuracy }));
    return { points, ceilings: ChartText.ofLines(task.lines, ChartText.beside(marks, width), -24, width - 96) };
  }

  // Speed against length: a line for each subject and size; dashes tell sizes of one name apart.
  function lengthData(group, width) {
    const rows = data.speed.rows.filter((row) => row.kind === group.kind && row.mode === state.speed && row.tokens_per_second !== null)
      .filter((row) => row.kind === "kernel" || !state.hiddenMixers.has(row.mixer));
    const sizes = {}, ends = {}, bySize = (a, b) => a.localeCompare(b, undefined, { numeric: true });
    for (const { name, series, length } of rows) {
      (sizes[name] ??= new Set()).add(series);
      ends[series] = Math.max(ends[series] ?? 0, length);
    }
    const speeds = rows.map((row) => {
      const { light, dark, shape } = data.mixers[row.mixer];
      const text = (value) => (value === null ? "none" : value.toFixed(2));
      return {
        ...row, color: isDark() ? dark : light, shape, variant: [...sizes[row.name]].sort(bySize).indexOf(row.series) % 4, last: ends[row.series] === row.length,
        tokens_text: Math.round(row.tokens_per_second).toLocaleString("en"), bound_text: `${text(row.bound_ratio)} (${row.bound_by})`, peer_text: `${text(row.peer_ratio)} ${row.peer}`,
      };
    });
    const last = speeds.filter((row) => row.last), down = ChartText.placed(last.map((row) => row.tokens_per_second)), across = ChartText.placed([...last.map((row) => row.length), 1]);
    ChartText.beside(last.map((row, i) => ({ row, text: row.series, x: across[i] * width, y: -350 * down[i] })), width);
    const lengths = speeds.map((row) => row.length), first = Math.min(...lengths) / 1.2, end = Math.max(...lengths);
    // The axis goes on behind the last length for the longest name there, at most for two fifths of it.
    const longest = Math.max(0, ...last.filter((row) => row.length === end).map((row) => (row.right_name ?? "").length));
    const names = Math.min(0.4, (6.6 * longest + 20) / (width - 70));
    return { speeds, span: [{ length: first }, { length: end * (end / first) ** (names / (1 - names)) }] };
  }

  // A chart whose rows are complete: only the theme's colours and the hidden mixers are ours to add.
  function extraData(item) {
    const values = item.values.filter((value) => !state.hiddenMixers.has(value.mixer));
    return { values: values.map((value) => ({ ...value, color: isDark() ? value.dark : value.light })) };
  }

  const KINDS = {
    extra: { spec: (item) => data.specs[item.spec], datasets: extraData, rows: "values" },
    recall: { spec: () => data.specs.recall, datasets: recallData, rows: "points" },
    lengths: { spec: () => data.specs.lengths, datasets: lengthData, rows: "speeds" },
    published: { spec: (panel) => data.specs.published[panel.axis], datasets: publishedData, rows: "values" },
    pareto: { spec: () => data.specs.pareto[state.axis], datasets: paretoData, rows: "points" },
    heat: { spec: () => data.specs.heat, datasets: heatData, rows: "slices", layout: (sets) => ({ height: 24 * new Set(sets.slices.map((s) => s.name)).size }) },
    families: { spec: () => data.specs.families, datasets: familyData, rows: "scores", layout: (sets) => ({ height: 24 * new Set(sets.scores.map((s) => s.name)).size }) },
    curves: { spec: () => data.specs.curves[state.progress], datasets: curveData, rows: "curves" },
  };

  // The charts take their colours from the style sheet, so there is one palette for the whole page.
  function chartConfig() {
    const style = getComputedStyle(document.documentElement);
    const ink = style.getPropertyValue("--ink").trim(), muted = style.getPropertyValue("--muted").trim();
    const line = style.getPropertyValue("--line").trim();
    const axis = { labelColor: muted, titleColor: ink, gridColor: line, domainColor: line, tickColor: line, titleFontWeight: 500, labelFontSize: 12, titleFontSize: 13, titlePadding: 10 };
    return {
      background: "transparent", font: style.getPropertyValue("--font").trim(), axis, view: { stroke: line },
      style: { front: { color: muted }, rule: { color: muted }, note: { color: muted }, name: { color: ink } },
    };
  }

  const drawing = new Map();

  async function draw(figure) {
    const kind = KINDS[figure.dataset.chart];
    const task = [...data.tasks, ...data.panels, ...data.extras].find((item) => item.id === figure.dataset.task);
    const target = figure.querySelector(".vis");
    const datasets = kind.datasets(task, target.clientWidth);
    figure.hidden = task !== undefined && state.hiddenTasks.has(task.task ?? task.id);
    // A later call overtakes an earlier one that is still being drawn.
    const turn = (drawing.get(target) || { turn: 0 }).turn + 1;
    drawing.get(target)?.result?.finalize();
    drawing.set(target, { turn });
    if (figure.hidden) return;
    if (!datasets[kind.rows].length) {
      target.textContent = "Nothing to draw: no point with a result is shown.";
      return;
    }
    const result = await vegaEmbed(target, { ...kind.spec(task), ...kind.layout?.(datasets), datasets }, {
      renderer: "svg",
      logLevel: 1, // errors only: an empty layer is not worth a warning
      actions: { export: true, source: false, compiled: false, editor: false },
      config: chartConfig(),
      tooltip: { theme: isDark() ? "dark" : "light" },
      downloadFileName: `mixer-bench-${[figure.dataset.chart, task?.title].filter(Boolean).join("-")}`,
    });
    if (drawing.get(target).turn === turn) drawing.set(target, { turn, result });
  }

  function frontText(task) {
    const front = paretoData(task, 0).front;
    if (!front.length) return "";
    const cost = (p) => (state.axis === "parameters" ? p.parameters_text : ChartText.bytes(p.x));
    return `Front, cheapest first: ${front.map((p) => `${p.name} (${cost(p)}, ${p.accuracy_text})`).join(" → ")}.`;
  }

  function showControls() {
    for (const box of controls.querySelectorAll("[name=mixer]")) box.checked = !state.hiddenMixers.has(box.value);
    for (const box of controls.querySelectorAll("[name=task]")) box.checked = !state.hiddenTasks.has(box.value);
    controls.elements.front.checked = state.front;
    for (const name of ["axis", "progress", "speed"]) if (controls.elements[name]) controls.elements[name].value = state[name];
    const count = data.points.filter(isShown).length;
    document.getElementById("shown").textContent = `${count} of ${data.points.length} points shown`;
    const theme = document.getElementById("theme");
    theme.setAttribute("aria-pressed", String(isDark()));
    document.documentElement.dataset.theme = isDark() ? "dark" : "light";
  }

  function showTables() {
    for (const element of document.querySelectorAll("[data-point]")) element.hidden = !isShown(byId[element.dataset.point]);
    for (const row of document.querySelectorAll("[data-speed=mixer]")) row.hidden = state.hiddenMixers.has(row.dataset.mixer);
    for (const row of table.tBodies[0].rows) {
      const on = byId[row.dataset.point][`front_${state.axis}`];
      const cell = row.querySelector(".front");
      cell.textContent = on ? "yes" : "";
      cell.dataset.value = on ? "1" : "0";
    }
    if (state.sort) SortableTable.sort(table, state.sort.column, state.sort.direction);
    for (const figure of document.querySelectorAll("[data-chart=pareto]")) {
      figure.querySelector(".front-text").textContent = frontText(data.tasks.find((task) => task.id === figure.dataset.task));
    }
  }

  function update(kinds = Object.keys(KINDS)) {
    writeHash();
    showControls();
    showTables();
    const figures = [...document.querySelectorAll("[data-chart]")].filter((figure) => kinds.includes(figure.dataset.chart));
    return Promise.all(figures.map(draw)).then(() => { document.documentElement.dataset.ready = "1"; });
  }

  const toggle = (set, value, hidden) => (hidden ? set.add(value) : set.delete(value));

  document.addEventListener("change", ({ target }) => {
    if (target.form !== controls) return;
    if (target.name === "mixer") toggle(state.hiddenMixers, target.value, !target.checked);
    else if (target.name === "task") toggle(state.hiddenTasks, target.value, !target.checked);
    else if (target.name === "front") state.front = target.checked;
    else state[target.name] = target.value;
    update({ progress: ["curves"], speed: ["recall", "lengths"] }[target.name]);
  });
  controls.addEventListener("submit", (event) => event.preventDefault());
  document.getElementById("reset").addEventListener("click", () => {
    state = { ...state, hiddenMixers: new Set(), hiddenTasks: new Set(), front: false };
    update();
  });
  document.getElementById("theme").addEventListener("click", () => {
    state.theme = isDark() ? "light" : "dark";
    update();
  });
  prefersDark.addEventListener("change", () => update());
  window.addEventListener("hashchange", () => { state = readHash(); update(); });
  SortableTable.attach(table, (column, direction) => { state.sort = { column, direction }; writeHash(); });

  function download(name, type, text) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }
  document.getElementById("csv").addEventListener("click", () => download("points.csv", "text/csv", data.csv));
  document.getElementById("json").addEventListener("click", () => {
    const { points, curves, tasks, speed } = data;
    download("report.json", "application/json", JSON.stringify({ tasks, points, curves, speed }, null, 1));
  });

  // On paper everything is open and light.
  const wasOpen = new Map();
  window.addEventListener("beforeprint", () => {
    for (const item of document.querySelectorAll("details:not(.vis details)")) { wasOpen.set(item, item.open); item.open = item.id !== "runs" || item.open; }
  });
  window.addEventListener("afterprint", () => { for (const [item, open] of wasOpen) item.open = open; });

  if (reduceMotion) document.documentElement.classList.add("still");
  update();
})();
