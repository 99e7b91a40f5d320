"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const one = (selector, root = document) => root.querySelector(selector);
  const table = one("#rows");

  // The table: sort within each protocol, filter, choose the metric.

  const sortKey = (row, column) => {
    const cell = row.cells[column];
    if (!cell || cell.colSpan > 1) return null;
    const value = cell.dataset.v;
    if (value !== undefined) return Number(value);
    const text = cell.textContent.trim();
    return text === "-" ? null : text;
  };

  const compare = (a, b) => {
    if (a === null || b === null) return a === b ? 0 : a === null ? 1 : -1; // what is missing stands last
    return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
  };

  const sort = (column, descending) => {
    for (const body of table.tBodies) {
      const rows = all("tr:not(.group)", body).map((row) => [sortKey(row, column), row]);
      rows.sort(([a], [b]) => (descending && a !== null && b !== null ? -compare(a, b) : compare(a, b)));
      body.append(...rows.map(([, row]) => row));
    }
    all("thead th", table).forEach((head, index) => {
      if (index === column) head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
  };

  const chosen = (id, otherwise) => one(`#${id}`)?.value ?? otherwise;

  const filter = () => {
    const words = chosen("filter", "").toLowerCase().split(/\s+/).filter(Boolean);
    const pattern = chosen("pattern", "");
    const each = chosen("each", "mean");
    let shown = 0, total = 0;
    for (const body of table.tBodies) {
      const about = one(".group", body).textContent.toLowerCase();
      let here = 0;
      for (const row of all("tr:not(.group)", body)) {
        const other = row.dataset.each && row.dataset.each !== each;
        const text = `${row.textContent.toLowerCase()} ${about}`;
        const fits = words.every((word) => text.includes(word)) && (!pattern || [pattern, "-"].includes(row.dataset.pattern));
        row.hidden = other || !fits;
        total += other ? 0 : 1;
        here += row.hidden ? 0 : 1;
      }
      one(".group", body).hidden = here === 0;
      shown += here;
    }
    one("#count").textContent = shown === total ? `${total} rows` : `${shown} of ${total} rows`;
  };

  const chooseMetric = () => {
    const wanted = `m${chosen("metric", "0")}`;
    all('[class*=" m"], [class^="m"]', table).forEach((cell) => {
      const own = [...cell.classList].find((name) => /^m\d+$/.test(name));
      if (own) cell.hidden = own !== wanted;
    });
    fillSort();
  };

  const fillSort = () => {
    const select = one("#sort");
    select.replaceChildren(new Option("as measured", ""));
    all("thead th", table).forEach((head, index) => {
      if (!head.hidden && head.textContent !== "repeat") select.append(new Option(head.textContent, index));
    });
  };

  const startTable = () => {
    one(".controls").hidden = false;
    all("thead th", table).forEach((head, index) => {
      one("button", head).addEventListener("click", () => sort(index, head.getAttribute("aria-sort") === "ascending"));
    });
    one("#filter").addEventListener("input", filter);
    for (const id of ["pattern", "each"]) one(`#${id}`)?.addEventListener("change", filter);
    one("#metric")?.addEventListener("change", chooseMetric);
    one("#sort").addEventListener("change", (event) => event.target.value && sort(Number(event.target.value), false));
    fillSort();
    filter();
  };

  // Charts: drawn one after the other, and again when the colours of the page change.

  const dark = matchMedia("(prefers-color-scheme: dark)");
  const printing = matchMedia("print");

  const colours = () => {
    const style = getComputedStyle(document.documentElement);
    const [ink, muted, line] = ["--ink", "--muted", "--line"].map((name) => style.getPropertyValue(name).trim());
    const text = { labelColor: muted, titleColor: ink, gridColor: line, domainColor: muted, tickColor: muted };
    const font = getComputedStyle(document.body).fontFamily;
    const categories = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f"];
    return {
      background: "transparent", font, axis: { ...text, titleFontWeight: "normal" }, legend: text, view: { stroke: null },
      text: { fill: ink }, rule: { stroke: muted }, range: { category: categories },
    };
  };

  const draw = async (place) => {
    if (place.dataset.drawn || !window.vegaEmbed) return;
    place.dataset.drawn = "yes";
    const spec = JSON.parse(one("script", place.parentElement).textContent);
    await vegaEmbed(place, spec, { actions: false, renderer: "svg", config: colours() });
  };

  const visible = (place) => place.offsetParent !== null;
  const pause = () => new Promise((done) => setTimeout(done)); // so that the page answers between two charts

  const drawAll = async () => {
    for (const place of all(".vega").filter(visible)) {
      await draw(place);
      await pause();
    }
  };

  const redraw = () => {
    all(".vega").forEach((place) => delete place.dataset.drawn);
    return drawAll();
  };

  const startCharts = () => {
    for (const box of all(".panels")) {
      const buttons = all("[data-panel]", one(".switch", box) ?? document.createElement("div"));
      const show = (name) => {
        all(".panel", box).forEach((panel) => { panel.hidden = panel.dataset.panel !== name; });
        buttons.forEach((button) => button.setAttribute("aria-pressed", button.dataset.panel === name));
        drawAll();
      };
      buttons.forEach((button) => button.addEventListener("click", () => show(button.dataset.panel)));
      if (buttons.length) {
        one(".switch", box).hidden = false;
        show(buttons[0].dataset.panel);
      }
    }
    drawAll();
    dark.addEventListener("change", redraw);
    printing.addEventListener("change", redraw);
  };

  // Files, folded parts, printing.

  const unpacked = async (name) => {
    const packed = one(`script[data-file="${name}"]`).textContent;
    const bytes = Uint8Array.from(atob(packed), (character) => character.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).blob();
  };

  const save = async (name) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await unpacked(name));
    link.download = name;
    link.click();
    URL.revokeObjectURL(link.href);
  };

  const startFiles = () => {
    all(".downloads").forEach((place) => { place.hidden = false; });
    all("[data-download]").forEach((button) => button.addEventListener("click", () => save(button.dataset.download)));
  };

  const openTarget = () => {
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target?.tagName === "DETAILS") target.open = true;
  };

  startTable();
  startCharts();
  startFiles();
  addEventListener("hashchange", openTarget);
  openTarget();
})();
