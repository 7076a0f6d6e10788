// Sliders through the slices; without scripts they stay hidden and the middle slice is shown.
for (const plane of document.querySelectorAll(".plane")) {
  const slider = plane.querySelector(".slider");
  if (!slider) continue;
  const [input, said] = [slider.querySelector("input"), slider.querySelector("output")];
  const places = input.dataset.places.split(" ");
  const strips = plane.querySelectorAll(".window img");
  const show = () => {
    for (const strip of strips) strip.style.top = `${-100 * input.value}%`;
    said.textContent = `${places[input.value]} of ${input.dataset.size}`;
    input.setAttribute("aria-valuetext", `slice ${said.textContent}`);
  };
  input.addEventListener("input", show);
  slider.hidden = false;
  show();
}
