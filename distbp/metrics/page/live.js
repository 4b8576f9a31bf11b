// Fetches the page anew from where it came from; what is open stays open.
async function renew() {
  const note = document.getElementById("live");
  try {
    const answer = await fetch(location.href, { cache: "no-store" });
    if (!answer.ok) throw new Error(answer.status);
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const open = [...document.querySelectorAll("details")].map(part => part.open);
    const scrolled = [...document.querySelectorAll(".wide, .tall")].map(part => [part.scrollLeft, part.scrollTop]);
    document.title = page.title;
    document.querySelector("main").replaceWith(page.querySelector("main"));
    document.querySelectorAll("details").forEach((part, number) => { if (open[number]) part.open = true; });
    document.querySelectorAll(".wide, .tall").forEach((part, number) => {
      if (scrolled[number]) [part.scrollLeft, part.scrollTop] = scrolled[number]; });
  } catch (error) {
    if (note) note.textContent = "distbp watch does not answer any more; this is what it said last";
  }
  const live = document.querySelector("[data-state]");
  setTimeout(renew, live && live.dataset.state === "running" ? 2000 : 10000);
}
setTimeout(renew, 2000);
