//! What a UNet is told over a segment, as its inputs: branches and attention sources side by side.

use std::collections::BTreeMap;

use ndarray::{Array2, Array4, Array5, ArrayView2, Axis, concatenate, s};

use super::guidance::misshapen;
use crate::error::Result;
use crate::plan::{AttentionSource, Branch, UnetForm, names};
use crate::tensor::Tensor;

/// The UNet's constant inputs for `branches`, each repeated for every picture: all of the first branch, then all of the next.
pub(super) fn lay_out(
    branches: &[&Branch],
    batch: usize,
    form: &UnetForm,
) -> Result<Vec<(String, Tensor)>> {
    let rows = |pick: fn(&Branch) -> ArrayView2<'_, f32>, name: &str| {
        let views = branches
            .iter()
            .flat_map(|b| std::iter::repeat_n(pick(b), batch))
            .collect::<Vec<_>>();
        concatenate(Axis(0), &views)
            .map(|joined| (name.to_owned(), Tensor::from(joined)))
            .map_err(|e| misshapen(name, &e))
    };
    let mut inputs = vec![
        rows(|b| b.text_embeds.view(), names::TEXT_EMBEDS)?,
        rows(|b| b.time_ids.view(), names::TIME_IDS)?,
    ];
    let Some(first) = branches.first() else {
        return Ok(inputs);
    };
    for width in first.text.keys() {
        let name = names::text_kv(*width);
        let of_branches = branches.iter().filter_map(|b| b.text.get(width));
        let views = of_branches.flat_map(|kv| std::iter::repeat_n(kv.view(), batch));
        let joined =
            concatenate(Axis(1), &views.collect::<Vec<_>>()).map_err(|e| misshapen(&name, &e))?;
        inputs.push((name, Tensor::from(joined)));
    }
    if let UnetForm::Image { places } = form {
        lay_out_images(branches, batch, places, &mut inputs)?;
    }
    Ok(inputs)
}

/// The part of the inputs that image prompts make; `places` counts those of a level by downsampling factor.
fn lay_out_images(
    branches: &[&Branch],
    batch: usize,
    places: &BTreeMap<usize, usize>,
    inputs: &mut Vec<(String, Tensor)>,
) -> Result<()> {
    let Some(first) = branches.first() else {
        return Ok(());
    };
    let nothing = AttentionSource::nothing(first);
    let sources = branches.iter().map(|branch| match &branch.images[..] {
        [] => vec![&nothing],
        images => images.iter().map(AsRef::as_ref).collect(),
    });
    let sources = sources.collect::<Vec<Vec<&AttentionSource>>>();
    let tokens = sources.iter().map(|of_branch| {
        let tokens = of_branch.iter().map(|source| source.tokens());
        tokens.collect::<Vec<_>>()
    });
    let tokens = tokens.collect::<Vec<_>>();
    let wanted = &tokens[0];
    if tokens.iter().any(|other| other != wanted) {
        let found = "branches with sources of other sizes";
        return Err(misshapen(names::IMAGE_VALID, &found));
    }
    let longest = wanted.iter().copied().max().unwrap_or(0);
    for width in first.text.keys() {
        let name = names::image_kv(*width);
        inputs.push((name, stack(&sources, batch, *width, longest)?));
    }
    let valid = Array2::from_shape_fn((wanted.len(), longest), |(source, token)| {
        i64::from(token < wanted[source])
    });
    inputs.push((names::IMAGE_VALID.to_owned(), Tensor::from(valid)));
    for (factor, places) in places {
        let areas = areas(&sources[0], *factor, *places)?;
        inputs.push((names::image_area(*factor), areas));
    }
    Ok(())
}

impl AttentionSource {
    /// How many tokens it has.
    fn tokens(&self) -> usize {
        self.kv.values().next().map_or(0, |kv| kv.dim().2)
    }

    /// A source that adds nothing: one token whose values are zero. The UNet that sees image prompts runs with it in
    /// segments that have none.
    fn nothing(like: &Branch) -> Self {
        let empty = |(width, kv): (&usize, &Array4<f32>)| {
            (*width, Array4::zeros((kv.dim().0, 1, 1, *width)))
        };
        Self {
            kv: like.text.iter().map(empty).collect(),
            area: None,
        }
    }
}

/// Keys and values `[2 * layers, rows, sources, tokens, width]` of the sources of every branch, padded with zeros to `longest`
/// tokens.
fn stack(
    branches: &[Vec<&AttentionSource>],
    batch: usize,
    width: usize,
    longest: usize,
) -> Result<Tensor> {
    let name = names::image_kv(width);
    let missing = || misshapen(&name, &"a source without this width");
    let first = branches.first().and_then(|sources| sources.first());
    let sides = first.and_then(|s| s.kv.get(&width)).ok_or_else(missing)?;
    let sources = branches.first().map_or(0, Vec::len);
    let shape = (
        sides.dim().0,
        branches.len() * batch,
        sources,
        longest,
        width,
    );
    let mut packed = Array5::<f32>::zeros(shape);
    for (at, of_branch) in branches.iter().enumerate() {
        for (place, source) in of_branch.iter().enumerate() {
            let kv = source.kv.get(&width).ok_or_else(missing)?;
            let (found, tokens) = (kv.dim().0, kv.dim().2);
            if found != shape.0 {
                return Err(misshapen(&name, &format!("{found} keys and values")));
            }
            for row in at * batch..(at + 1) * batch {
                let part = s![.., row, place, ..tokens, ..];
                packed.slice_mut(part).assign(&kv.index_axis(Axis(1), 0));
            }
        }
    }
    Ok(Tensor::from(packed))
}

/// The weights `[sources, places]` of a level's places.
fn areas(sources: &[&AttentionSource], factor: usize, places: usize) -> Result<Tensor> {
    let mut weights = Array2::<f32>::ones((sources.len(), places));
    for (mut row, source) in weights.rows_mut().into_iter().zip(sources) {
        let Some(area) = source.area.as_ref() else {
            continue;
        };
        let found = area.get(&factor).map(Vec::as_slice).unwrap_or_default();
        if found.len() != places {
            let reason = format!("{} weights for {places} places", found.len());
            return Err(misshapen(&names::image_area(factor), &reason));
        }
        row.assign(
            &ArrayView2::from_shape((1, places), found)
                .map_err(|e| misshapen(&names::image_area(factor), &e))?
                .row(0),
        );
    }
    Ok(Tensor::from(weights))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    const WIDTH: usize = 6;

    /// Two layers; every value is `fill`.
    fn source(tokens: usize, fill: f32, area: Option<Vec<f32>>) -> Arc<AttentionSource> {
        Arc::new(AttentionSource {
            kv: [(WIDTH, Array4::from_elem((4, 1, tokens, WIDTH), fill))].into(),
            area: area.map(|weights| [(2, weights)].into()),
        })
    }

    fn branch(images: Vec<Arc<AttentionSource>>) -> Branch {
        Branch {
            text_embeds: Array2::zeros((1, 3)),
            time_ids: Array2::zeros((1, 6)),
            text: [(WIDTH, Array4::from_elem((4, 1, 7, WIDTH), 9.0))].into(),
            images,
        }
    }

    fn inputs(branches: &[&Branch], batch: usize) -> BTreeMap<String, Tensor> {
        let form = UnetForm::Image {
            places: [(2, 4)].into(),
        };
        lay_out(branches, batch, &form)
            .unwrap()
            .into_iter()
            .collect()
    }

    fn f32s(tensor: &Tensor) -> &ndarray::ArrayD<f32> {
        match tensor {
            Tensor::F32(array) => array,
            Tensor::I64(_) => panic!("i64"),
        }
    }

    #[test]
    fn sources_of_unequal_length_are_padded_and_marked() {
        let area = vec![0.0, 0.25, 1.0, 1.0];
        let positive = branch(vec![
            source(2, 1.0, None),
            source(5, 2.0, Some(area.clone())),
        ]);
        let negative = branch(vec![source(2, 3.0, None), source(5, 4.0, Some(area))]);
        let inputs = inputs(&[&negative, &positive], 2);
        let kv = f32s(&inputs["image_kv_6"]);
        assert_eq!(kv.shape(), [4, 4, 2, 5, WIDTH]);
        let at = |row, source, token| kv[[3, row, source, token, 0]] as i64;
        assert_eq!(
            [at(0, 0, 1), at(1, 1, 4), at(2, 0, 1), at(3, 1, 4)],
            [3, 4, 1, 2]
        );
        assert_eq!([at(0, 0, 2), at(3, 0, 4)], [0, 0]);
        let valid = ndarray::arr2(&[[1_i64, 1, 0, 0, 0], [1, 1, 1, 1, 1]]);
        assert_eq!(inputs["image_valid"], Tensor::from(valid));
        let area = ndarray::arr2(&[[1.0_f32, 1.0, 1.0, 1.0], [0.0, 0.25, 1.0, 1.0]]);
        assert_eq!(inputs["image_area_2"], Tensor::from(area));
    }

    #[test]
    fn a_segment_without_image_prompts_sees_one_token_of_nothing() {
        let inputs = inputs(&[&branch(Vec::new())], 1);
        let kv = f32s(&inputs["image_kv_6"]);
        assert_eq!(kv.shape(), [4, 1, 1, 1, WIDTH]);
        assert!(kv.iter().all(|v| *v == 0.0));
        assert_eq!(inputs["image_valid"].shape(), [1, 1]);
    }

    #[test]
    fn branches_with_other_sources_and_areas_of_other_size_are_refused() {
        let form = UnetForm::Image {
            places: [(2, 4)].into(),
        };
        let one = branch(vec![source(2, 1.0, None)]);
        let other = branch(vec![source(3, 1.0, None)]);
        assert!(lay_out(&[&one, &other], 1, &form).is_err());
        let small = branch(vec![source(2, 1.0, Some(vec![1.0; 3]))]);
        let error = lay_out(&[&small], 1, &form).unwrap_err().to_string();
        assert!(error.contains("3 weights for 4 places"), "{error}");
    }
}
