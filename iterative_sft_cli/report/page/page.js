(() => {
  const box = document.getElementById("search");
  if (!box) return;
  const round = document.getElementById("round"), verdict = document.getElementById("verdict");
  const count = document.getElementById("count");
  const cards = Array.from(document.querySelectorAll(".sample"), (card) => ({ card, text: card.textContent.toLowerCase() }));
  const apply = () => {
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const { card, text } of cards) {
      const fits = words.every((word) => text.includes(word)) &&
        (!round.value || card.dataset.round === round.value) &&
        (!verdict.value || card.dataset.verdict === verdict.value);
      card.hidden = !fits;
      shown += fits;
    }
    count.textContent = shown + " of " + cards.length + " shown";
  };
  const asked = new URLSearchParams(location.hash.slice(1));
  box.value = asked.get("q") || "";
  round.value = asked.get("round") || "";
  verdict.value = asked.get("verdict") || "";
  for (const one of [box, round, verdict]) one.addEventListener("input", apply);
  apply();
})();
