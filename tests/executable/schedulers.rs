//! Choosing and listing schedulers.

use crate::workshop::Workshop;

fn succeed(output: &std::process::Output) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
}

#[test]
fn schedulers_are_listed_and_drawn() {
    let w = Workshop::new();
    let output = w.tronie(&["schedulers", "--draw", "levels.gif"]).output();
    w.assert_fails(&output.unwrap(), 2, &["draw", ".png"]);
    let arguments = ["schedulers", "--model", "tiny", "--draw", "levels.png"];
    let output = w.tronie(&arguments).output().unwrap();
    succeed(&output);
    let text = String::from_utf8_lossy(&output.stdout);
    for part in [
        "dpmpp-2m-sde  (DPMSolverMultistepScheduler)",
        "arXiv 2302.04867",
        "2n - 1 model calls",
        "ays",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let picture = image::open(w.path("levels.png")).unwrap().to_rgb8();
    let coloured = |colour| picture.pixels().filter(|pixel| pixel.0 == colour).count();
    // Karras' curve, in most panels.
    assert!(coloured([214, 90, 20]) > 1000);
}

#[test]
fn every_scheduler_paints() {
    let w = Workshop::new();
    for kind in tronie::schedulers::SchedulerKind::ALL {
        let output = w.generate(&["--scheduler", kind.name(), "--output", "painted.png"]);
        succeed(&output);
    }
}

#[test]
fn lists_say_how_many_steps_there_are_and_travel_with_the_picture() {
    let w = Workshop::new();
    let list = [
        "--sigmas-list",
        "14.6,4,1.5,0.5,0",
        "--output",
        "listed.png",
    ];
    let mut arguments = vec!["generate", "a face", "--model", "tiny", "--width", "64"];
    arguments.extend(["--height", "64", "--seed", "1"]);
    arguments.extend(list);
    succeed(&w.tronie(&arguments).output().unwrap());
    let output = w.tronie(&["inspect", "listed.png"]).output().unwrap();
    let request: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(request["steps"], 4);
    assert_eq!(request["sigmas-list"][1], 4.0);
    let again = [
        "generate",
        "--request",
        "listed.png",
        "--output",
        "again.png",
    ];
    succeed(&w.tronie(&again).output().unwrap());
    let bytes = |name| std::fs::read(w.path(name)).unwrap();
    assert_eq!(bytes("listed.png"), bytes("again.png"));
}

#[test]
fn options_that_do_nothing_are_refused_by_name() {
    let w = Workshop::new();
    for (arguments, parts) in [
        (["--eta", "0.5"], ["eta", "ddim, tcd"]),
        (["--sigma-range", "table"], ["sigma-range", "karras"]),
        (["--solver-order", "2"], ["solver-order", "dpmpp-2m"]),
        (["--final-sigma", "none"], ["zero, sigma-min", "none"]),
        (["--sigmas-list", "1,2"], ["sigmas-list", "steps"]),
        (["--timesteps-list", "5,x"], ["timesteps-list", "x"]),
    ] {
        w.assert_fails(&w.generate(&arguments), 2, &parts);
    }
}
