"use strict";
// What runs now, every few seconds; the whole page where there is something new, with all choices as they were.

const SECONDS_BETWEEN_LOOKS = 5;
const SECONDS_BETWEEN_PAGES = 10;
const KEPT = "unclip-board";
const loadedAt = Date.now();

const isBox = (field) => ["checkbox", "radio"].includes(field.type);
const nameOf = (each) => each.id || `${each.name ?? ""} ${isBox(each) ? each.value : ""} ${(each.closest("label") ?? each.querySelector("summary"))?.textContent}`;
const stateOf = (each) => (each.localName === "details" ? each.open : isBox(each) ? each.checked : each.value);
const choices = () => [...document.querySelectorAll("input, select, details")];

function keep() {
  const states = Object.fromEntries(choices().map((each) => [nameOf(each), stateOf(each)]));
  sessionStorage.setItem(KEPT, JSON.stringify({ top: scrollY, states }));
}

function restore() {
  const kept = JSON.parse(sessionStorage.getItem(KEPT) ?? "null");
  sessionStorage.removeItem(KEPT);
  if (kept === null) return;
  for (const each of choices()) {
    const state = kept.states[nameOf(each)];
    if (state === undefined || state === stateOf(each)) continue;
    if (each.localName === "details") { each.open = state; continue; }
    if (isBox(each)) each.checked = state;
    else each.value = state;
    for (const name of ["input", "change"]) each.dispatchEvent(new Event(name, { bubbles: true }));
  }
  scrollTo(0, kept.top);
}

async function look() {
  const now = document.getElementById("now-tables");
  try {
    const answer = await fetch("now", { cache: "no-store" });
    if (!answer.ok) throw new Error(`${answer.status}`);
    const { html, version } = await answer.json();
    now.innerHTML = html; // escaped where it was made, and this page's policy runs no script in it
    document.getElementById("now-state").textContent = `as of ${new Date().toLocaleTimeString()}`;
    const isOld = Date.now() - loadedAt > 1000 * SECONDS_BETWEEN_PAGES;
    if (version !== now.dataset.version && isOld && document.visibilityState === "visible") {
      keep();
      location.reload();
    }
  } catch {
    document.getElementById("now-state").textContent = "the board does not answer; is unclip board running?";
  }
}

restore();
setInterval(look, 1000 * SECONDS_BETWEEN_LOOKS);
look();
