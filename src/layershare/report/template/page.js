"use strict";
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");

  // Plotly's template: what a figure does not say itself. It is made of the page's own colours.
  function template() {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const axis = { gridcolor: colour("--line"), linecolor: colour("--line"), tickfont: { size: 11 }, title: { font: { size: 12 } }, fixedrange: true };
    return {
      layout: {
        paper_bgcolor: "rgba(0,0,0,0)",
        plot_bgcolor: "rgba(0,0,0,0)",
        font: { family: style.fontFamily, size: 12, color: colour("--soft") },
        hoverlabel: { bgcolor: colour("--panel"), bordercolor: colour("--line"), font: { color: colour("--ink"), size: 13 }, align: "left" },
        xaxis: axis,
        yaxis: axis,
      },
      data: { scatter: [{ textfont: { color: colour("--ink") } }] },
    };
  }

  const drawn = [];
  function draw(place) {
    for (const chart of place.querySelectorAll("figure.chart:not([data-drawn])")) {
      if (chart.closest("details:not([open])")) continue; // drawn when that is opened
      const figure = JSON.parse(chart.firstElementChild.textContent);
      chart.dataset.drawn = "";
      for (const trace of figure.data) {
        if (trace.type !== "heatmap") continue;
        const longest = Math.max(...trace.text.flat().map((word) => word.length));
        if (trace.x.length * (6 * longest + 2) > chart.offsetWidth - 60) delete trace.texttemplate; // no room for words
      }
      Plotly.newPlot(chart, figure.data, { ...figure.layout, template: template() }, { displayModeBar: false, responsive: true });
      drawn.push(chart);
    }
  }

  dark.addEventListener("change", () => drawn.forEach((chart) => Plotly.relayout(chart, { template: template() })));
  for (const part of document.querySelectorAll("details")) part.addEventListener("toggle", () => part.open && draw(part));
  draw(document);

  // The value of a cell: what it says to sort by, or its text; empty ones go last in either direction.
  const value = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent;
  function compare(a, b, sign) {
    if (a === "" || b === "") return (a === "") - (b === "");
    return sign * (isNaN(a) || isNaN(b) ? a.localeCompare(b, undefined, { numeric: true }) : a - b);
  }
  for (const table of document.querySelectorAll("table.sortable")) {
    const headings = [...table.tHead.rows[0].cells];
    headings.forEach((heading, column) => heading.firstElementChild.addEventListener("click", () => {
      const direction = heading.ariaSort === "ascending" ? "descending" : "ascending";
      for (const each of headings) each.ariaSort = each === heading ? direction : "none";
      const sign = direction === "ascending" ? 1 : -1;
      table.tBodies[0].append(...[...table.tBodies[0].rows].sort((a, b) => compare(value(a, column), value(b, column), sign)));
    }));
  }
})();
