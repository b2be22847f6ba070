// Draws every element with data-chart by uPlot, in the colours of the style sheet; draws again when the scheme changes.
(() => {
  const HEIGHT = 230, ROW = 34, FONT = "12px system-ui, sans-serif", NAMED = 0.4;
  const INCREMENTS = [1, 2, 5].flatMap((n) => Array.from({ length: 9 }, (_, i) => n * 10 ** i)).sort((a, b) => a - b);
  const style = getComputedStyle(document.documentElement);
  const ink = (name) => style.getPropertyValue(name).trim();
  const colour = (index) => ink(`--c${index % 8}`);

  const label = (value) => {
    if (value == null || typeof value === "string") return value ?? "-";
    if (Number.isInteger(value) && Math.abs(value) < 1e6) return value.toLocaleString("en-US");
    if (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6) return value.toExponential(2).replace(/\.?0*e\+?/, "e");
    return String(Number(value.toPrecision(4)));
  };

  const measure = document.createElement("canvas").getContext("2d");
  const widthOf = (text) => { measure.font = FONT; return measure.measureText(text).width; };
  const fitting = (text, room) => {
    if (widthOf(text) <= room) return text;
    let end = text.length;
    while (end > 1 && widthOf(text.slice(0, end) + "…") > room) end--;
    return text.slice(0, end) + "…";
  };

  const axis = (more) => ({
    stroke: () => ink("--soft"), font: FONT, labelFont: FONT, labelSize: 18, labelGap: 2, gap: 4,
    grid: { stroke: () => ink("--line"), width: 1 }, ticks: { stroke: () => ink("--line"), width: 1, size: 4 }, ...more,
  });
  const wide = (u, texts) => 12 + Math.max(0, ...(texts ?? []).map((text) => widthOf(String(text ?? ""))));
  const figures = { values: (u, splits) => splits.map(label), size: wide };

  // the parts from the bottom up to and with each one, of those that are shown
  const stack = (values, shown) => {
    const sum = values[0].map(() => 0);
    return values.map((part, index) => part.map((value, place) => (sum[place] += shown[index] ? value ?? 0 : 0)));
  };

  // uPlot paints in the order of its series: what is to lie on top comes last; the legend keeps the order of the names
  const lines = (chart) => {
    const series = [{}], data = [chart.x], bands = [];
    const known = chart.x.length <= 60;
    chart.names.forEach((name, index) => {
      const band = chart.bands[index] ?? [];
      if (!band.some(Boolean)) return;
      for (const end of [1, 0]) {
        data.push(band.map((pair) => pair?.[end] ?? null));
        series.push({ class: "aside", of: index, spanGaps: true, points: { show: false } });
      }
      bands.push({ series: [series.length - 2, series.length - 1], fill: colour(index) + "2b" });
    });
    for (let index = chart.names.length - 1; index >= 0; index--) {
      data.push(chart.values[index]);
      series.push({
        label: chart.names[index], of: index, stroke: colour(index), width: 2, spanGaps: true,
        points: { show: known, size: 6, fill: colour(index) },
        value: (u, value, _, place) => {
          const pair = place == null ? null : chart.bands[index]?.[place];
          return label(value) + (pair ? ` (${label(pair[0])} to ${label(pair[1])})` : "");
        },
      });
    }
    const range = chart.share ? (u, low, high) => [0, Math.max(1, high ?? 1)] : undefined;
    return { series, data, bands, scales: { x: { time: false }, y: { range } } };
  };

  const bars = (chart) => {
    const series = [{}], shown = chart.names.map(() => true);
    const paths = uPlot.paths.bars({ size: [0.72, 64] });
    const stacked = () => [chart.x, ...stack(chart.values, shown).reverse()];
    for (let index = chart.names.length - 1; index >= 0; index--) {
      const value = (u, _, __, place) => label(place == null ? null : chart.values[index][place]);
      series.push({ label: chart.names[index], of: index, fill: colour(index), width: 0, paths, points: { show: false }, value });
    }
    const setSeries = (u, index, change) => {
      if (index == null || change.show == null) return;
      shown[u.series[index].of] = change.show;
      u.setData(stacked());
    };
    const x = (u, low, high) => [low - 0.5, high + 0.5];
    const y = (u, low, high) => [0, (high || 1) * 1.05];
    const scales = { x: { time: false, range: x }, y: { range: y } };
    return { series, data: stacked(), scales, hooks: { setSeries: [setSeries] } };
  };

  const funnel = (chart, width) => {
    const places = chart.x.map((_, place) => place);
    const paths = uPlot.paths.bars({ size: [0.62, 22] });
    const series = chart.names.map((name, index) => ({
      label: name, of: index, fill: index ? colour(0) : ink("--faint"), width: 0, paths, points: { show: false },
      value: (u, value) => label(value),
    }));
    const room = width * NAMED, most = Math.max(...chart.values[0]);
    const names = axis({
      side: 3, grid: { show: false }, splits: () => places, size: wide, gap: 6,
      values: (u, splits) => splits.map((place) => fitting(chart.x[place], room)),
    });
    return {
      height: chart.x.length * ROW + 46,
      series: [{ value: (u, place) => (place == null ? "-" : chart.x[place]) }, ...series],
      data: [places, ...chart.values],
      axes: [names, axis({ side: 2, label: chart.yName, ...figures, size: 24, space: 30 + widthOf(label(most)) })],
      scales: {
        x: { time: false, ori: 1, dir: -1, range: () => [-0.5, chart.x.length - 0.5] },
        y: { ori: 0, range: (u, low, high) => [0, high || 1] },
      },
      padding: [6, 8 + widthOf(label(most)) / 2, 0, 0],
    };
  };

  const draw = (place, width) => {
    const chart = JSON.parse(place.dataset.chart);
    const made = { lines, bars, funnel }[chart.kind](chart, width);
    const last = chart.x.length - 1;
    const steps = chart.kind === "lines" && last > 60;
    const { hooks, series, data, ...more } = made;
    series[0] = { label: chart.xName, value: (u, value) => label(value), ...series[0] };
    // with no pointer on it the legend says the last values
    const rest = (u) => { if (u.legend.idx == null) u.setLegend({ idx: last }, false); };
    const arrange = (u) => {
      u.root.querySelectorAll(".u-series").forEach((row, index) => { row.style.order = index ? 1 + series[index].of : 0; });
      rest(u);
    };
    const follow = (u, index, change) => {
      if (index == null || change.show == null) return;
      series.forEach((one, other) => {
        if (one.class && one.of === series[index].of && u.series[other].show !== change.show) u.setSeries(other, { show: change.show }, false);
      });
    };
    const options = {
      width, height: HEIGHT, series, ms: 1, padding: [8, 12, 0, 0],
      axes: [
        axis({ label: chart.xName, incrs: INCREMENTS, values: figures.values, size: 24 }),
        axis({ label: chart.yName, ...figures }),
      ],
      cursor: { y: false, drag: { x: steps, y: false }, points: { show: chart.kind === "lines", size: 9 } },
      legend: { markers: { width: 0, fill: (u, index) => (index ? series[index].fill ?? series[index].stroke : null) } },
      hooks: { ...hooks, ready: [arrange], setLegend: [rest], setSeries: [...(hooks?.setSeries ?? []), follow] },
      ...more,
    };
    return new uPlot(options, data, place);
  };

  // a chart is drawn when it first has a width: those of a closed round when it is opened
  const drawn = new Map();
  const fit = (place) => {
    const width = Math.floor(place.clientWidth);
    const chart = drawn.get(place);
    if (!width || chart?.width === width) return;
    chart?.destroy();
    drawn.set(place, draw(place, width));
  };
  const places = document.querySelectorAll("[data-chart]");
  const sizes = new ResizeObserver((entries) => requestAnimationFrame(() => entries.forEach(({ target }) => fit(target))));
  places.forEach((place) => { fit(place); sizes.observe(place); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const chart of drawn.values()) chart.destroy();
    drawn.clear();
    places.forEach(fit);
  });
})();
