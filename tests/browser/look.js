// Works in JupyterLab and looks at a run's notebooks and report, as a person would; says what it did, and fails at
// the first thing that is not as it should be.
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { copyFileSync, existsSync, mkdirSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { chromium } from "playwright-core";

const run = process.argv[2];
const pictures = "outputs/browser"; // screenshots, and copies of the notebooks: the originals stay as they are
const DESKTOP = { width: 1280, height: 900 };
const PHONE = { width: 390, height: 844 };

const training = readdirSync(run, { recursive: true }).filter((file) => file.endsWith("train/train.ipynb")).sort()[0];
const report = join(run, "report/report.html");
assert(training && existsSync(report), `${run} is not a finished run: make demo`);
rmSync(pictures, { recursive: true, force: true });
mkdirSync(pictures, { recursive: true });
copyFileSync("nbs/explore/errors.ipynb", join(pictures, "errors.ipynb"));
copyFileSync(join(run, training), join(pictures, "train.ipynb"));

// The lab's own settings are not the user's, and it does not offer its news.
const settings = join(pictures, "lab");
mkdirSync(join(settings, "@jupyterlab/apputils-extension"), { recursive: true });
writeFileSync(join(settings, "@jupyterlab/apputils-extension/notification.jupyterlab-settings"), '{"fetchNews": "false"}');

// Chromium starts none of its own services, and its pages get no further than this machine.
const browser = await chromium.launch({
  executablePath: "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"],
});

// A page that collects what went wrong in it.
async function open(viewport) {
  const context = await browser.newContext({ viewport });
  const page = await context.newPage();
  page.wrong = [];
  page.on("console", (message) => message.type() === "error" && page.wrong.push(`console: ${message.text()}`));
  page.on("pageerror", (error) => page.wrong.push(`script: ${error.message}`));
  await page.route(
    (url) => !["127.0.0.1", "localhost"].includes(url.hostname) && /^(http|ws)/.test(url.protocol),
    (route) => { page.wrong.push(`asks ${route.request().url()}`); return route.abort(); },
  );
  return page;
}

async function close(page, what) {
  assert.deepEqual(page.wrong, [], what);
  await page.context().close();
  console.log(`ok: ${what}`);
}

async function sameWidth(page, what) {
  const [needed, width] = await page.evaluate(() => [document.documentElement.scrollWidth, window.innerWidth]);
  assert(needed <= width, `${what}: ${needed} pixels wide on a screen of ${width}`);
}

async function startLab() {
  const lab = spawn(".venv/bin/jupyter", ["lab", "--no-browser", "--ip=127.0.0.1", "--port=0", "--allow-root"], {
    stdio: ["ignore", "ignore", "pipe"],
    env: { ...process.env, JUPYTERLAB_SETTINGS_DIR: settings, JUPYTERLAB_WORKSPACES_DIR: settings },
  });
  const address = await new Promise((found, failed) => {
    let said = "";
    lab.stderr.on("data", (text) => {
      said += text;
      const match = said.match(/http:\/\/127\.0\.0\.1:\d+\/lab\?token=\w+/);
      if (match) found(new URL(match[0]));
    });
    lab.on("exit", () => failed(new Error(said)));
  });
  return [lab, address];
}

// The lab with one notebook, in a workspace of its own.
async function openNotebook(address, name, viewport) {
  const page = await open(viewport);
  await page.goto(`${address.origin}/lab/workspaces/${name}-${viewport.width}/tree/${pictures}/${name}.ipynb${address.search}`);
  await page.locator(".jp-Notebook .jp-Cell").first().waitFor({ timeout: 60_000 });
  if (viewport === PHONE) await page.keyboard.press("Control+b"); // no room for the list of files
  await page.waitForTimeout(2000); // pictures are laid out
  return page;
}

async function workInLab(address) {
  const page = await openNotebook(address, "errors", DESKTOP);
  await page.getByRole("menuitem", { name: "Run", exact: true }).click();
  await page.getByRole("menuitem", { name: "Run All Cells", exact: true }).click();
  const slider = page.locator(".widget-slider", { hasText: "threshold" });
  await slider.waitFor({ timeout: 300_000 });
  const picture = page.locator(".jp-OutputArea-output .widget-output img, .jupyter-widgets-output-area img").last();
  await picture.waitFor({ timeout: 60_000 });
  assert.equal(await page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.error']").count(), 0, "a cell failed");
  assert.equal(await page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr']").count(), 0, "a cell warned");
  const before = await picture.getAttribute("src");
  await slider.scrollIntoViewIfNeeded();
  await page.screenshot({ path: join(pictures, "errors-before.png") });
  await slider.locator(".noUi-handle").focus();
  for (let k = 0; k < 6; k++) await page.keyboard.press("ArrowRight");
  await page.waitForFunction((old) => [...document.querySelectorAll(".jupyter-widgets-output-area img")].at(-1)?.src !== old, before, { timeout: 60_000 });
  await page.getByText("| Idle").waitFor({ timeout: 60_000 });
  assert.notEqual((await slider.innerText()).match(/0\.\d+/)[0], "0.50", "the slider did not move");
  await page.screenshot({ path: join(pictures, "errors-after.png") });
  await close(page, "errors.ipynb ran from the menu, and its picture followed the slider");
}

async function lookAtRun(address) {
  for (const [name, viewport] of Object.entries({ desktop: DESKTOP, phone: PHONE })) {
    let page = await openNotebook(address, "train", viewport);
    await page.screenshot({ path: join(pictures, `train-${name}.png`) });
    await sameWidth(page, "train.ipynb");
    await close(page, `${training} opened in JupyterLab at ${name} width`);

    page = await open(viewport);
    await page.goto(`file://${resolve(report)}`);
    await sameWidth(page, "report.html");
    await page.screenshot({ path: join(pictures, `report-${name}.png`), fullPage: true });
    if (name === "desktop") await page.pdf({ path: join(pictures, "report.pdf"), format: "A4" });
    await close(page, `${report} opened at ${name} width`);
  }
}

let lab, address;
try {
  [lab, address] = await startLab();
  await workInLab(address);
  await lookAtRun(address);
  console.log(`screenshots: ${pictures}`);
} finally {
  await browser.close();
  lab?.kill("SIGINT");
  lab?.kill("SIGINT"); // the second one says yes to the question that the first one asks
}
