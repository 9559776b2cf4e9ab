// Shows the cut that the controls name. All cuts are in the page: nothing is computed here.
const data = JSON.parse(document.getElementById("data").textContent);
const [granularity, training, limited, place] = ["granularity", "training", "limited", "place"].map((id) =>
  document.getElementById(id),
);
const views = {};

const seriesName = () => [granularity.value, training.value, limited.value].join(" ");

function show() {
  const cut = data.series[seriesName()][Number(place.value)];
  document.getElementById("limit").textContent = cut.limit;
  place.setAttribute("aria-valuetext", cut.limit);
  for (const element of document.querySelectorAll("[data-show]")) {
    element.textContent = cut.shown[element.dataset.show];
  }
  const chosen = [...cut.units, ...cut.components.map((index) => data.components[index])];
  for (const element of document.querySelectorAll("[data-unit]")) {
    element.textContent = chosen.includes(element.dataset.unit) ? "yes" : "";
  }
  const signals = { chosen, granularity: granularity.value, series: seriesName(), place: Number(place.value) };
  views.ranking?.height(data.heights[granularity.value]);
  for (const view of Object.values(views)) {
    for (const [name, value] of Object.entries(signals)) view.signal(name, value);
    view.runAsync();
  }
}

// Another ranking or limit: the cut with the same components, or else the first one.
function change(before) {
  for (const option of limited.options) {
    option.disabled = !data.series[[granularity.value, training.value, option.value].join(" ")];
  }
  if (limited.selectedOptions[0].disabled) limited.value = "units";
  const cuts = data.series[seriesName()];
  place.max = cuts.length - 1;
  place.value = Math.max(0, cuts.findIndex((cut) => String(cut.components) === before));
  show();
}

const shown = () => String(data.series[current][Number(place.value)].components);
let current = data.start.series;
[granularity.value, training.value, limited.value] = current.split(" ");
place.max = data.series[current].length - 1;
place.value = data.start.place;
for (const choice of [granularity, training, limited]) {
  choice.addEventListener("change", () => {
    const before = shown();
    change(before);
    current = seriesName();
  });
}
place.addEventListener("input", show);
change(shown());

// ast: an expression is interpreted, so that the page needs no eval.
const options = { mode: "vega-lite", renderer: "svg", actions: false, ast: true };
Promise.all(
  Object.entries(data.charts).map(async ([id, chart]) => {
    const { view } = await vegaEmbed(document.getElementById(id), chart, options);
    views[id] = view;
  }),
).then(() => {
  show();
  document.body.dataset.ready = "";
});
