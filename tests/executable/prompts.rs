//! Prompts, guidance and seeds from the command line: what is said, what is refused, what repeats itself.

use crate::workshop::Workshop;

fn said(output: &std::process::Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    said
}

fn levels(w: &Workshop, name: &str) -> Vec<u8> {
    image::open(w.path(name)).unwrap().to_rgb8().into_raw()
}

#[test]
fn the_cost_is_said_before_anything_is_loaded() {
    let w = Workshop::new();
    for (arguments, cost) in [
        (
            &[][..],
            "tiny's UNet 4 times, 4 with guidance: 8 evaluations",
        ),
        (
            &["--guidance", "1"],
            "tiny's UNet 4 times, 0 with guidance: 4 evaluations",
        ),
        (
            &["--scheduler", "heun"],
            "tiny's UNet 7 times, 7 with guidance: 14 evaluations",
        ),
        (
            &["--scheduler", "pndm"],
            "tiny's UNet 5 times, 5 with guidance: 10 evaluations",
        ),
        (
            &["--guidance-interval", "0.1,3"],
            "tiny's UNet 4 times, 2 with guidance: 6 evaluations",
        ),
        (
            &["--guidance-list", "3,1", "--batch", "3"],
            "tiny's UNet 4 times, 3 with guidance: 7 evaluations, 21 for 3 pictures",
        ),
        (
            &[
                "--refiner",
                "tiny-refiner",
                "--refine-at",
                "0.5",
                "--guidance-interval",
                "0.1,3",
            ],
            "tiny's UNet 2 times, 1 with guidance; tiny-refiner's UNet 2 times, 1 with guidance: 6 evaluations",
        ),
    ] {
        let said = said(&w.generate(arguments));
        let at = said.find(cost);
        assert!(
            at.is_some_and(|at| at < said.find("loading").unwrap()),
            "{cost}: {said}"
        );
    }
}

#[test]
fn a_run_cut_into_segments_goes_on_from_any_step() {
    let w = Workshop::new();
    let bytes = |name: &str| std::fs::read(w.path(name)).unwrap();
    // Every step is a segment, on a scheduler that remembers and on one that draws for three pictures.
    for scheduler in ["dpmpp-2m", "euler-ancestral"] {
        let common = [
            "generate",
            "a [cat|dog|(owl:1.2)] [in:on:2] oil, BREAK red",
            "--model",
            "tiny",
            "--steps",
            "6",
        ];
        let options = [
            "--prompt-syntax",
            "a1111",
            "--negative",
            "[x:y:0.5]",
            "--guidance-list",
            "1,6,2",
        ];
        let more = [
            "--scheduler",
            scheduler,
            "--seed",
            "7,8,9",
            "--noise",
            "cuda",
        ];
        let run = |last: &[&str]| {
            let arguments = [&common[..], &options, &more, last].concat();
            said(&w.tronie(&arguments).output().unwrap());
        };
        run(&["--output", "whole.png"]);
        for stop in ["0", "1", "3", "5"] {
            run(&["--stop-at", stop, "--latents-out", "half"]);
            let on = ["generate", "--latents-in", "half", "--output", "on.png"];
            said(&w.tronie(&on).output().unwrap());
            for picture in 0..3 {
                let (whole, on) = (format!("whole-{picture}.png"), format!("on-{picture}.png"));
                assert_eq!(
                    bytes(&whole),
                    bytes(&on),
                    "{scheduler} at {stop}, picture {picture}"
                );
            }
        }
    }
}

#[test]
fn a_picture_of_several_seeds_is_the_one_of_its_seed() {
    let w = Workshop::new();
    let common = [
        "generate",
        "a sailor",
        "--model",
        "tiny",
        "--steps",
        "3",
        "--scheduler",
        "dpmpp-sde",
    ];
    let run = |last: &[&str]| said(&w.tronie(&[&common[..], last].concat()).output().unwrap());
    for noise in ["cpu", "cpu-f16", "cuda"] {
        run(&["--noise", noise, "--seed", "4,5,6", "--output", "all.png"]);
        for (picture, seed) in ["4", "5", "6"].iter().enumerate() {
            run(&["--noise", noise, "--seed", seed, "--output", "one.png"]);
            let all = levels(&w, &format!("all-{picture}.png"));
            // Batches may round otherwise inside the network.
            let apart = all
                .iter()
                .zip(levels(&w, "one.png"))
                .filter(|(a, b)| a.abs_diff(*b) > 1);
            assert_eq!(apart.count(), 0, "{noise}, seed {seed}");
        }
    }
}

#[test]
fn brackets_mean_something_only_when_asked_to() {
    let w = Workshop::new();
    let paint = |name: &str, prompt: &str, more: &[&str]| {
        let common = [
            "generate", prompt, "--model", "tiny", "--steps", "4", "--seed", "3", "--output", name,
        ];
        said(&w.tronie(&[&common[..], more].concat()).output().unwrap());
        levels(&w, name)
    };
    let a1111 = ["--prompt-syntax", "a1111"];
    let plain = paint("plain.png", "a red cap", &[]);
    assert_eq!(plain, paint("same.png", "a red cap", &a1111));
    assert_eq!(plain, paint("until.png", "a red [cap:hat:1.0]", &a1111));
    assert_ne!(plain, paint("switch.png", "a red [cap:hat:0.5]", &a1111));
    assert_ne!(plain, paint("heavy.png", "a (red:1.5) cap", &a1111));
    assert_eq!(
        paint("brackets.png", "a (red:1.5) cap", &[]),
        paint("escaped.png", r"a \(red:1.5\) cap", &a1111)
    );
}

#[test]
fn long_prompts_are_chunks_unless_they_are_to_be_cut() {
    let w = Workshop::new();
    let long = format!("{} lighthouse", "a very old sailor, ".repeat(20));
    let run = |more: &[&str]| {
        let common = [
            "generate",
            long.as_str(),
            "--model",
            "tiny",
            "--steps",
            "2",
            "--seed",
            "3",
        ];
        w.tronie(&[&common[..], more].concat()).output().unwrap()
    };
    assert!(!said(&run(&["--output", "a.png"])).contains("dropped"));
    let cut = said(&run(&["--long-prompts", "cut", "--output", "b.png"]));
    assert!(
        cut.contains("dropped") && cut.contains("lighthouse"),
        "{cut}"
    );
    assert_ne!(levels(&w, "a.png"), levels(&w, "b.png"));
    let both = run(&["--long-prompts", "cut", "--prompt-syntax", "a1111"]);
    assert_eq!(both.status.code(), Some(2));
}

#[test]
fn what_makes_no_sense_is_refused() {
    let w = Workshop::new();
    for (arguments, parts) in [
        (
            &["--guidance-interval", "3,1"][..],
            &["guidance-interval", "LOW < HIGH"][..],
        ),
        (
            &["--guidance-interval", "3"],
            &["guidance-interval", "LOW,HIGH"],
        ),
        (
            &["--guidance-list", "1,2,3,4,5"],
            &["guidance-list", "1 to 4"],
        ),
        (&["--guidance-list", "nan"], &["guidance-list", "finite"]),
        (&["--guidance-list", "3", "--guidance", "2"], &["guidance"]),
        (
            &["--seed", "1,2", "--batch", "3"],
            &["seed", "2 seeds for 3"],
        ),
        (&["--seed", "1,x"], &["seed", "1,x"]),
        (&["--seed=-1"], &["seed", "-1"]),
        (&["--noise", "gpu"], &["gpu", "cpu-f16", "cuda"]),
        (&["--prompt-syntax", "comfy"], &["comfy", "plain, a1111"]),
        (&["--clip-skip", "9"], &["clip-skip", "layers"]),
        (
            &[
                "--negative",
                "(((x:99999999999999999999999999999999999999999)))",
                "--prompt-syntax",
                "a1111",
            ],
            &["negative", "finite"],
        ),
    ] {
        w.assert_fails(
            &w.tronie(
                &[
                    &["generate", "x", "--model", "tiny", "--steps", "4"],
                    arguments,
                ]
                .concat(),
            )
            .output()
            .unwrap(),
            2,
            parts,
        );
    }
}

#[test]
fn an_interval_that_misses_every_level_says_so() {
    let w = Workshop::new();
    let said = said(&w.generate(&["--guidance-interval", "100,200", "--negative", "x"]));
    assert!(said.contains("warning: guidance has no effect"), "{said}");
    assert!(said.contains("warning: negative has no effect"), "{said}");
    assert!(said.contains("0 with guidance"), "{said}");
}

#[test]
fn one_way_to_give_guidance_or_seeds_replaces_the_other() {
    let w = Workshop::new();
    said(&w.generate(&["--output", "a.png"]));
    let again = |more: &[&str]| {
        let common = [
            "generate",
            "--request",
            "a.png",
            "--output",
            "b.png",
            "--json",
        ];
        let output = w.tronie(&[&common[..], more].concat()).output().unwrap();
        said(&output);
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()["request"].take()
    };
    let request = again(&["--guidance-list", "4,2", "--seed", "5,6"]);
    assert!(request.get("guidance").is_none(), "{request}");
    assert_eq!(
        (&request["guidance-list"][0], &request["batch"]),
        (&4.0.into(), &2.into())
    );
    assert_eq!(request["seed"], serde_json::json!([5, 6]));
    std::fs::rename(w.path("b-0.png"), w.path("a.png")).unwrap();
    let request = again(&["--guidance", "3", "--seed", "9"]);
    assert!(request.get("guidance-list").is_none(), "{request}");
    assert_eq!(
        (&request["seed"], &request["batch"]),
        (&9.into(), &2.into())
    );
}
