// Draws the charts of a page: each `figure[data-chart]` has its figures as JSON, and a table with the same figures stands beside it.
"use strict";

(() => {
  const drawn = new Map();

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // The distances of labels on the axis of time: figures are sums of whole days.
  const DAYS = [1, 2, 7, 14, 30, 91, 365].map((days) => days * 86400);

  const day = (seconds) => new Date(seconds * 1000).toISOString().slice(0, 10);

  const shown = (unit) => (value) => {
    if (value === null || value === undefined) return "–";
    const text = value.toLocaleString("en-US", { maximumFractionDigits: unit === "$" ? 4 : 2 });
    return unit === "$" ? `$${text}` : unit ? `${text} ${unit}` : text;
  };

  const draw = (figure) => {
    const data = JSON.parse(figure.dataset.chart);
    figure.hidden = false;
    const place = figure.querySelector(".plot");
    const axis = { stroke: colour("--soft"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line"), width: 1 } };
    const options = {
      width: Math.max(240, place.clientWidth),
      height: Math.max(160, place.clientHeight - 30 * (data.series.length > 1)),
      scales: { x: { time: true }, y: { range: (_, low, high) => [Math.min(0, low), high > 0 ? high * 1.08 : 1] } },
      tzDate: (seconds) => uPlot.tzDate(new Date(seconds * 1000), "UTC"),
      axes: [{ ...axis, incrs: DAYS, values: (_, splits) => splits.map((seconds) => day(seconds).slice(5)) }, { ...axis, size: 64, values: (_, values) => values.map(shown(data.unit)) }],
      series: [
        { value: (_, seconds) => (seconds === null ? "–" : day(seconds)) },
        ...data.series.map((series, index) => ({
          label: series.label,
          stroke: colour(`--series-${(index % 6) + 1}`),
          width: 2,
          points: { show: data.x.length < 40 },
          value: (_, value) => shown(data.unit)(value),
        })),
      ],
    };
    drawn.get(figure)?.destroy();
    drawn.set(figure, new uPlot(options, [data.x.map((day) => Date.parse(day) / 1000), ...data.series.map((series) => series.values)], place));
  };

  const all = () => {
    for (const [figure, chart] of drawn) {
      if (!figure.isConnected) {
        chart.destroy();
        drawn.delete(figure);
      }
    }
    for (const figure of document.querySelectorAll("figure[data-chart]")) draw(figure);
  };

  let later = 0;
  const again = () => {
    clearTimeout(later);
    later = setTimeout(all, 100);
  };
  addEventListener("resize", again);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  document.addEventListener("htmx:after:swap", again);
  all();
})();
