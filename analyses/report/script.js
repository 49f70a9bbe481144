"use strict";
(async () => {
  const PAPER = 900;  // pixels, which the style scales to the width of the text on A4
  const PAGE = 1220;  // and the height of a figure that fills a page
  const CONFIG = { displayModeBar: false, responsive: false };
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const ink = () => getComputedStyle(document.body).color;
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];

  const unpacked = async (id) => {
    const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (c) => c.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  };

  if (!matchMedia("(min-width: 1120px)").matches) all("nav details").forEach((d) => { d.open = false; });
  all("nav a").forEach((link) => link.addEventListener("click", () => {
    if (!matchMedia("(min-width: 1120px)").matches) link.closest("details").open = false;
  }));

  const payload = JSON.parse(await unpacked("payload"));

  // Tables: the page holds the first rows; sorting and downloads are of the whole.
  const read = (csv) => {
    const rows = [[]];
    for (const [, quoted, plain, end] of csv.matchAll(/(?:"((?:[^"]|"")*)"|([^,\r\n]*))(,|\r?\n|$)/g)) {
      rows.at(-1).push(quoted === undefined ? plain : quoted.replaceAll('""', '"'));
      if (end !== ",") rows.push([]);
    }
    return rows.filter((row) => row.length === rows[0].length).slice(1);
  };
  const shown = (text) => {
    if (!/^-?\d[\d.]*(e[-+]?\d+)?$/.test(text) || /^-?\d+$/.test(text)) return text;
    const value = Number(text);
    return Math.abs(value) >= 1e4 ? value.toFixed(0) : String(Number(value.toPrecision(4)));
  };
  const sort = (head) => {
    const table = head.closest("table");
    const heads = all("thead th", table);
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((h) => h.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const at = Number(head.dataset.place);
    const isNumber = head.classList.contains("n");
    const compare = isNumber ? (a, b) => a - b : (a, b) => a.localeCompare(b, "en", { numeric: true });
    const rows = read(payload.tables[table.dataset.table]);
    rows.sort((a, b) => (a[at] === "") - (b[at] === "") || (down ? -1 : 1) * compare(a[at], b[at]));
    all("tbody tr", table).forEach((line, i) => all("td", line).forEach((cell, j) => {
      cell.textContent = shown(rows[i][Number(heads[j].dataset.place)]);
    }));
  };
  const hand = (content, name, type) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([content], { type }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  };
  all("th[data-place] button").forEach((b) => b.addEventListener("click", () => sort(b.closest("th"))));
  all("[data-download]").forEach((b) => b.addEventListener("click", () => {
    hand(payload.tables[b.dataset.download], `${b.dataset.download}.csv`, "text/csv");
  }));

  // Figures: drawn for the width, the theme and the paper at hand.
  const script = document.createElement("script");
  script.textContent = await unpacked("plotly");
  document.head.append(script);
  const change = (layout, path, value) => {  // as Plotly.relayout does
    const names = path.replace("[", ".").replace("]", "").split(".");
    const last = names.pop();
    const within = names.reduce((inside, name) => (inside[name] ??= {}), layout);
    within[last] = value;
  };
  const draw = (box, onPaper = false) => {
    const figure = payload.figures[box.dataset.figure];
    const { data, layout } = structuredClone(figure);
    const width = onPaper ? PAPER : box.clientWidth;
    const isNarrow = width < payload.narrow_below;
    if (isNarrow) {
      Object.entries(figure.narrow).forEach(([path, value]) => change(layout, path, structuredClone(value)));
    }
    Object.assign(layout, { width, autosize: false, font: { ...layout.font, color: onPaper ? "#000" : ink() } });
    if (onPaper) layout.height = Math.min(layout.height, PAGE);
    if (matchMedia("(pointer: coarse)").matches) layout.dragmode = false;  // else a figure holds the page when scrolled
    box.style.minHeight = "0";
    layout.legend = { ...layout.legend, maxheight: 1 };
    Plotly.react(box, data, layout, CONFIG);
    const more = (box._fullLayout.legend?._height ?? 0) - figure.legend[isNarrow ? "narrow" : "wide"];
    if (more > 4) Plotly.relayout(box, { height: layout.height + more });
  };
  const boxes = all(".plotly-graph-div");
  const redraw = (onPaper) => boxes.forEach((box) => draw(box, onPaper));
  for (const box of boxes) {
    draw(box);
    await new Promise((next) => setTimeout(next));
  }
  all("[data-image]").forEach((b) => b.addEventListener("click", () => {
    const box = document.querySelector(`#figure-${CSS.escape(b.dataset.image)} .plotly-graph-div`);
    Plotly.downloadImage(box, { format: "svg", filename: b.dataset.image, width: box._fullLayout.width, height: box._fullLayout.height });
  }));
  dark.addEventListener("change", () => redraw(false));
  let waiting;
  let width = innerWidth;
  addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => { if (innerWidth !== width) { width = innerWidth; redraw(false); } }, 200);
  });

  let opened = [];
  addEventListener("beforeprint", () => {
    opened = all("main details:not([open])");
    opened.forEach((d) => { d.open = true; });
    redraw(true);
  });
  addEventListener("afterprint", () => {
    opened.forEach((d) => { d.open = false; });
    redraw(false);
  });
  document.documentElement.dataset.drawn = "yes";
})().catch((error) => {
  document.querySelectorAll(".plotly-graph-div:empty").forEach((box) => {
    box.style.minHeight = "0";
    box.textContent = `This browser cannot draw it (${error.message}): see figures/${box.dataset.figure}.html.`;
  });
});
